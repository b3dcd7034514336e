"""A lease on building one artifact, so that two runs that need it build it once; only an object store is required.

Only `put_if_absent` is atomic on every S3-compatible server, so a lease is a series of generations, each created by
exactly one process and never edited by another: `leases/<fingerprint>/1.json`, `2.json`, ... The newest generation is
the holder; creating the next one takes over from it. A holder keeps changing `<n>.beat`; a waiter considers it dead
when that object has not changed for a while on the waiter's own monotonic clock, so clocks need not agree. Time in
which the store did not answer does not count: the holder could not reach it either.

Servers whose conditional put only looks before it writes (OpenStack Swift) may let two processes start. Then the last
writer is the holder, and the fence below stops the other.

A process that slept through a takeover cannot be stopped from outside. So the holder calls `Fence.check` before it
publishes anything: an artifact that appeared meanwhile, a newer generation, or a record that is not its own means that
it lost. A series is only deleted as a whole, once its artifact exists; from then on the manifest itself is the fence.
"""

import functools
import logging
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from stages.artifacts.addresses import artifact_key
from stages.artifacts.manifests import MANIFEST, utc_now
from stages.artifacts.store import Store, write_json
from stages.config.base import Config
from stages.config.errors import Category, DataError, StageError
from stages.config.records import parse_record
from stages.config.request import StageRequest

logger = logging.getLogger("athanor")


class LeaseLostError(StageError):
    """Another process took over building this artifact, or has built it."""

    category = Category.LOST


@dataclass(frozen=True)
class LeaseTimes:
    """How often a holder beats and how long a waiter waits; the same in all processes that share a store."""

    beat_seconds: float = 10.0
    stale_seconds: float = 60.0
    """A holder without a beat for this long is dead: longer than any pause of a busy process or a slow store."""
    poll_seconds: float = 2.0


class Owner(Config):
    """The process that builds."""

    run_id: str
    run_name: str
    airflow_url: str
    submission_id: str
    """Of the Ray job; empty for a stage started by hand."""
    host: str
    pid: int
    since: str
    """UTC, ISO 8601; only shown to people."""

    @classmethod
    def of(cls, request: StageRequest) -> "Owner":
        run = request.run
        return cls(
            run_id=run.run_id,
            run_name=run.name,
            airflow_url=run.airflow_url,
            submission_id=request.submission_id,
            host=platform.node(),
            pid=os.getpid(),
            since=utc_now(),
        )

    @property
    def lineage(self) -> str:
        """What the jobs of one task instance have in common: their ids differ only in the number at the end."""
        return re.sub(r"-\d+$", "", self.submission_id)

    def __str__(self) -> str:
        job = f"job {self.submission_id}, " if self.submission_id else ""
        return f"run {self.run_id} ({job}process {self.pid} on {self.host}, since {self.since})"


class Generation(Config):
    """One record of the series."""

    token: str
    """Unique to the process that created it."""
    owner: Owner
    released: bool = False
    """The holder ended without an artifact; the next builder need not wait."""


_UNKNOWN = Owner(
    run_id="unknown", run_name="", airflow_url="", submission_id="", host="unknown", pid=0, since="an unknown time"
)
_DAMAGED = Generation(token="", owner=_UNKNOWN)
"""Stands for a record that cannot be read. Its holder may be alive, and then its heartbeat says so."""


class Fence(Config):
    """Lets a process check that it is still the holder; small enough to be sent to worker processes."""

    kind: str
    fingerprint: str
    number: int
    token: str

    def check(self, store: Store) -> None:
        """Raise LeaseLostError unless this generation is the newest and the artifact does not exist.

        Cheap enough for every checkpoint: three small reads. A takeover between the check and the write that it guards
        goes unnoticed; `put_if_absent` of the manifest, with the hashes in it, is the last line of defence.
        """
        if store.exists(f"{artifact_key(self.kind, self.fingerprint)}/{MANIFEST}"):
            raise self._lost("has been published by another process")
        newer = read_generation(store, self.fingerprint, self.number + 1)
        if newer is not None:
            raise self._lost(f"is being built by {newer.owner}")
        own = read_generation(store, self.fingerprint, self.number)
        if own is _DAMAGED and _beats(store, self.fingerprint, self.number, self.token):
            return
        if own is None or own.token != self.token:
            raise self._lost("is no longer leased to this process")

    def _lost(self, what: str) -> LeaseLostError:
        return LeaseLostError(
            f"artifact {self.kind}/{self.fingerprint[:12]} {what}; this process was taken for dead and stops",
            advice="Nothing was overwritten. The retry uses the other process's artifact.",
        )


class Lease:
    """A context manager that beats while inside; the lease is removed after success and released after a failure."""

    def __init__(self, store: Store, fence: Fence, owner: Owner, times: LeaseTimes) -> None:
        self.fence = fence
        self._store, self._owner, self._times = store, owner, times
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_stopped, name="lease", daemon=True)

    def check(self) -> None:
        """Raise LeaseLostError when this process is no longer the holder."""
        self.fence.check(self._store)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(self._times.beat_seconds)
        try:
            self._release(built=kind is None)
        except Exception as error:  # noqa: BLE001 - any error of the store: others wait until the lease is stale
            logger.warning(
                "The lease was not released (%s): others take it over in %.0f s.", error, self._times.stale_seconds
            )

    def _release(self, *, built: bool) -> None:
        number, fingerprint = self.fence.number, self.fence.fingerprint
        if built:
            self._store.delete(f"leases/{fingerprint}")
            return
        own = read_generation(self._store, fingerprint, number)
        if own is not None and own.token == self.fence.token:
            released = Generation(token=own.token, owner=self._owner, released=True)
            write_json(self._store, _record_key(fingerprint, number), released.model_dump(mode="json"))
            self._store.delete(_beat_key(fingerprint, number))

    def _beat_until_stopped(self) -> None:
        key, count = _beat_key(self.fence.fingerprint, self.fence.number), 0
        while True:
            count += 1
            try:
                self._store.write_bytes(key, f"{self.fence.token} {count}".encode())
            except Exception as error:  # noqa: BLE001 - the next beat may succeed; if none does, the fence stops us
                logger.warning("The lease's heartbeat was not written: %s", error)
            if self._stop.wait(self._times.beat_seconds):
                return


def acquire(
    store: Store,
    *,
    kind: str,
    fingerprint: str,
    owner: Owner,
    times: LeaseTimes | None = None,
    on_wait: Callable[[Owner, float], None] = lambda holder, seconds: None,
) -> Lease | None:
    """Return the lease, or None as soon as the artifact exists because another process has built it.

    Waits while another process builds, and calls `on_wait(holder, seconds)` at every look. It takes over at once from
    a holder that released, and from an earlier attempt of the same task: the job of that attempt has ended, or Airflow
    would not have started another.
    """
    times, token = times or LeaseTimes(), uuid.uuid4().hex
    manifest_key = f"{artifact_key(kind, fingerprint)}/{MANIFEST}"
    watch, started, tried = _Watch(times.beat_seconds), time.monotonic(), False
    while True:
        if store.exists(manifest_key):
            return None
        number, newest = _newest(store, fingerprint)
        reason = _may_take_over(newest, owner, watch.unchanged_seconds(store, fingerprint, number), times)
        if newest is not None and not reason:
            if watch.looks == 1:
                logger.info("Waiting for %s, which builds it.", newest.owner)
            on_wait(newest.owner, time.monotonic() - started)
            time.sleep(times.poll_seconds)
            continue
        mine = Generation(token=token, owner=owner)
        if tried:
            time.sleep(times.poll_seconds)  # another process was faster, or the store says two things about one record
        tried = True
        if store.put_if_absent(_record_key(fingerprint, number + 1), mine.model_dump_json(indent=1).encode()):
            written = read_generation(store, fingerprint, number + 1)
            if written is None or written.token != token:
                continue  # a server whose put-if-absent is not atomic let another process write as well
            if newest is not None:
                logger.info("Taking over from %s: %s.", newest.owner, reason)
            lease = Lease(
                store, Fence(kind=kind, fingerprint=fingerprint, number=number + 1, token=token), owner, times
            )
            if not store.exists(manifest_key):
                return lease
            # It was published after the first look and before the lease.
            store.delete(f"leases/{fingerprint}")
            return None


class _Watch:
    """Measures how long a generation and its heartbeat have not changed, by this process's monotonic clock.

    Between two looks at most `longest_seconds` count, however long the store was away.
    """

    def __init__(self, longest_seconds: float) -> None:
        self._longest_seconds = longest_seconds
        self._seen: tuple[int, bytes] | None = None
        self._looked_at = self._unchanged_seconds = 0.0
        self.looks = 0
        """Number of looks at this generation."""

    def unchanged_seconds(self, store: Store, fingerprint: str, number: int) -> float:
        try:
            beat = store.read_bytes(_beat_key(fingerprint, number))
        except FileNotFoundError:
            beat = b""
        if self._seen is None or self._seen[0] != number:
            self.looks = 0
        self.looks += 1
        now = time.monotonic()
        if self._seen != (number, beat):
            self._seen, self._unchanged_seconds = (number, beat), 0.0
        else:
            self._unchanged_seconds += min(now - self._looked_at, self._longest_seconds)
        self._looked_at = now
        return self._unchanged_seconds


def _may_take_over(newest: Generation | None, owner: Owner, silent_seconds: float, times: LeaseTimes) -> str:
    """Return the reason not to wait for the newest generation; empty when there is none."""
    if newest is None:
        return ""
    if newest.released:
        return "it ended without an artifact"
    if owner.lineage and newest.owner.lineage == owner.lineage:
        return "it was an earlier attempt of this task"
    if silent_seconds >= times.stale_seconds:
        return f"no heartbeat for {silent_seconds:.0f} s"
    return ""


def _newest(store: Store, fingerprint: str) -> tuple[int, Generation | None]:
    """Read upwards from 1 instead of listing, because listings of some stores lag behind."""
    number, newest = 0, None
    while (found := read_generation(store, fingerprint, number + 1)) is not None:
        number, newest = number + 1, found
    return number, newest


def read_generation(store: Store, fingerprint: str, number: int) -> Generation | None:
    """Return one record of a series, None when there is none; a damaged one stands for a holder without a name."""
    key = _record_key(fingerprint, number)
    try:
        return parse_record(Generation, store.read_bytes(key), f"{store.root_uri}/{key}")
    except FileNotFoundError:
        return None
    except DataError as error:
        _warn_once(f"{error.message}. Its holder counts as alive while its heartbeat changes.")
        return _DAMAGED


@functools.lru_cache(maxsize=1000)
def _warn_once(message: str) -> None:
    """A waiter looks every few seconds."""
    logger.warning("%s", message)


def _beats(store: Store, fingerprint: str, number: int, token: str) -> bool:
    """Whether the last heartbeat came from the process with this token."""
    try:
        return store.read_bytes(_beat_key(fingerprint, number)).startswith(f"{token} ".encode())
    except FileNotFoundError:
        return False


def _record_key(fingerprint: str, number: int) -> str:
    return f"leases/{fingerprint}/{number}.json"


def _beat_key(fingerprint: str, number: int) -> str:
    return f"leases/{fingerprint}/{number}.beat"
