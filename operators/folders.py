"""Whose records lie in a folder under `runs/`: each run has one of its own, and a record there says whose it is.

DAG id and exact run id make the folder's name (`run_folder`). Before, the run id alone did, with all unusual characters
replaced: two runs could share a folder. Such a folder stays in use by the run whose requests are in it, so that a run
which was cleared after an upgrade finds what it had done; other runs get a new one.
"""

import json

from stages.artifacts.store import Store
from stages.config.base import Config
from stages.config.errors import ConfigError, DataError
from stages.config.records import parse_record
from stages.config.request import run_folder, safe_run_id

_OWNER, _CONFIGURATION = "owner.json", "pipeline.json"
_REQUESTS = ("config.json", "request.json")
"""Records that name their run, in the folders of before, too."""


class RunOwner(Config):
    """`owner.json`, written before all other records of a run."""

    dag_id: str
    airflow_run_id: str

    def __str__(self) -> str:
        return f"run {self.airflow_run_id!r} of DAG {self.dag_id!r}"


def claim_folder(store: Store, dag_id: str, airflow_run_id: str) -> str:
    """Return the run's folder, marked as its own; raises ConfigError when another run's records are in it, DataError
    when its record is damaged."""
    mine = RunOwner(dag_id=dag_id, airflow_run_id=airflow_run_id)
    folder = find_folder(store, dag_id, airflow_run_id)
    key = f"runs/{folder}/{_OWNER}"
    if not store.put_if_absent(key, mine.model_dump_json().encode()):
        owner = _owner(store, key)
        if owner != mine:
            raise ConfigError(
                f"{store.root_uri}/runs/{folder} belongs to {owner}, not to {mine}",
                advice="Trigger the run under another run id.",
            )
    return folder


def find_folder(store: Store, dag_id: str, airflow_run_id: str) -> str:
    """Return where the records of a run are, or will be: its own folder, or the one it had before an upgrade."""
    folder, before = run_folder(dag_id, airflow_run_id), safe_run_id(airflow_run_id)
    if store.exists(f"runs/{folder}/{_OWNER}"):
        return folder
    if not before or not store.exists(f"runs/{before}/{_CONFIGURATION}"):
        return folder
    mine = RunOwner(dag_id=dag_id, airflow_run_id=airflow_run_id)
    owners = owners_of_before(store, before)
    return before if owners and all(owner == mine for owner in owners) else folder


def owners_of_before(store: Store, folder: str) -> list[RunOwner | None]:
    """Return whose each request in a folder is; None for one that does not say."""
    keys = store.list(f"runs/{folder}")
    return [_named_in(store.read_bytes(key)) for key in keys if key.rsplit("/", 1)[-1] in _REQUESTS]


def _named_in(request: bytes) -> RunOwner | None:
    try:
        run = json.loads(request)["run"]
        return RunOwner(dag_id=run["dag_id"], airflow_run_id=run["airflow_run_id"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def _owner(store: Store, key: str) -> RunOwner:
    try:
        return parse_record(RunOwner, store.read_bytes(key), f"{store.root_uri}/{key}")
    except (DataError, FileNotFoundError):
        raise DataError(
            f"{store.root_uri}/{key} does not say whose records these are",
            advice="It is damaged, or not written by Athanor; delete it when no other run uses the folder.",
        ) from None
