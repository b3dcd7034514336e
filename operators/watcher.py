"""Sees new raw data: a trigger for Airflow's AssetWatcher that polls a `file://` or `s3://` prefix.

Surprising on purpose: an event is remembered one poll after it was fired, when Airflow has stored it. A triggerer that
dies in between fires the same event again rather than never; who acts on it (`operators.retrain`) compares digests, so
the second one finds nothing new.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from airflow.triggers.base import BaseEventTrigger, TriggerEvent

_WATERMARK = "athanor.watched"


@dataclass(frozen=True)
class Listing:
    """What lies below a prefix at one moment."""

    digest: str
    """Over names, sizes and versions, sorted; contents are not read."""
    num_objects: int
    num_bytes: int


def list_prefix(uri: str) -> Listing:
    """List a prefix; one that does not exist is empty. Raises ConfigError for an unknown scheme."""
    from stages.artifacts.addresses import open_store

    entries = sorted((entry.key, entry.size, entry.version) for entry in open_store(uri).listing())
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return Listing(digest, len(entries), sum(size for _, size, _ in entries))


class PrefixTrigger(BaseEventTrigger):
    """Fire once for each change below `uri`, as soon as two polls in a row saw the same.

    The watermark is the digest that was last reported; it lives in the state store of the watched asset.
    """

    def __init__(self, uri: str, poll_interval: float = 60.0) -> None:
        super().__init__()
        self.uri = uri
        self.poll_interval = poll_interval

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {"uri": self.uri, "poll_interval": self.poll_interval},
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        reported = await self._watermark()
        remembered = reported
        before: str | None = None
        while True:
            now = await self._look()
            if now is not None:
                if reported != remembered:
                    await self._remember(reported)
                    remembered = reported
                if now.num_objects and now.digest == before and now.digest != reported:
                    self.log.info("%s changed: %d objects, %d bytes.", self.uri, now.num_objects, now.num_bytes)
                    yield TriggerEvent(
                        {"uri": self.uri, "digest": now.digest, "objects": now.num_objects, "bytes": now.num_bytes}
                    )
                    reported = now.digest
                before = now.digest
            await asyncio.sleep(self.poll_interval)

    async def _look(self) -> Listing | None:
        """List in a thread, so that a slow store holds up no other trigger; an outage is said and waited out."""
        try:
            return await asyncio.to_thread(list_prefix, self.uri)
        except Exception as error:  # noqa: BLE001 - whatever the store's client raises: a watcher that ended would never look again
            self.log.warning("%s cannot be listed, looking again in %g s: %s", self.uri, self.poll_interval, error)
            return None

    async def _watermark(self) -> str:
        if self.asset_state_store is None:
            self.log.warning("No asset state store: a restart of the triggerer reports %s once more.", self.uri)
            return ""
        stored = await self.asset_state_store.aget(_WATERMARK, {})
        return str(stored.get(self.uri, "")) if isinstance(stored, dict) else ""

    async def _remember(self, digest: str) -> None:
        if self.asset_state_store is not None:
            await self.asset_state_store.aset(_WATERMARK, {self.uri: digest})
