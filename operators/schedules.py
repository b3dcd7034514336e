"""The schedule of `retrain`, read from the environment of the DAG processor, so that no DAG file needs an edit.

`ATHANOR_RETRAIN_CRON` (UTC) and `ATHANOR_RETRAIN_WATCH` (prefix of raw text); without both, only when triggered.
"""

import os
from typing import Any

from airflow.sdk import Asset, AssetOrTimeSchedule, AssetWatcher, CronTriggerTimetable

PREFERENCES = "llm/preferences"
RAW_DOCUMENTS = "llm/raw-documents"


def raw_documents() -> Asset:
    """The asset of new raw text, with a watcher if a prefix is configured."""
    prefix = os.environ.get("ATHANOR_RETRAIN_WATCH", "")
    if not prefix:
        return Asset(name=RAW_DOCUMENTS, group="llm")
    from operators.watcher import PrefixTrigger

    seconds = float(os.environ.get("ATHANOR_RETRAIN_POLL_SECONDS", "60"))
    watcher = AssetWatcher(name="raw-documents", trigger=PrefixTrigger(uri=prefix, poll_interval=seconds))
    return Asset(name=RAW_DOCUMENTS, group="llm", watchers=[watcher])


def retrain_schedule() -> Any:
    """Return a schedule by time, by data, by both, or None."""
    cron, watched = os.environ.get("ATHANOR_RETRAIN_CRON", ""), os.environ.get("ATHANOR_RETRAIN_WATCH", "")
    data = raw_documents() | Asset(name=PREFERENCES, group="llm")
    if cron and watched:
        return AssetOrTimeSchedule(timetable=CronTriggerTimetable(cron, timezone="UTC"), assets=data)
    if cron:
        return CronTriggerTimetable(cron, timezone="UTC")
    return data if watched else None
