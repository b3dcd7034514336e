"""Garbage collection, second half: delete what `stages.artifacts.retention` found.

Deletion takes two steps, because a run may begin meanwhile. First the manifests are deleted, so that no later run hits
the artifacts. Then runs and registry are read again, and what they have come to need gets its manifest back. Only then
are the files deleted, those of an artifact under the lease on building it.
"""

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

from stages.artifacts.lease import LeaseTimes, Owner, acquire
from stages.artifacts.manifests import MANIFEST, utc_now
from stages.artifacts.retention import Picture, Policy, Registered, Waste, ask_registry, needed_keys
from stages.artifacts.store import Store

logger = logging.getLogger("athanor")


def delete(store: Store, waste: list[Waste], registered: Registered, policy: Policy) -> list[Waste]:
    """Delete what `find` found if it is still not needed; return what was deleted."""
    picture = Picture(store, policy)
    manifests = picture.manifests()
    taken: dict[str, bytes] = {}
    for key in sorted({entry.key for entry in waste if entry.what == "artifact"} & manifests.keys()):
        taken[key] = store.read_bytes(f"{key}/{MANIFEST}")
        store.delete(f"{key}/{MANIFEST}")
    needed = set(taken)  # all manifests come back if the second look fails
    try:
        picture = Picture(store, policy)
        needed = needed_keys(picture, manifests, ask_registry(registered, manifests, policy))
    finally:
        for key in needed & taken.keys():
            if key.rsplit("/", 1)[1] not in picture.live:  # otherwise its builder will publish it
                store.put_if_absent(f"{key}/{MANIFEST}", taken[key])
                logger.info("%s is needed after all and is kept", key)
    return [entry for entry in waste if entry.key not in needed and _remove(picture, entry)]


def _remove(picture: Picture, entry: Waste) -> bool:
    """Delete one thing unless a process has begun to build it; whether it was deleted."""
    store = picture.store
    fingerprint = entry.key.rsplit("/", 1)[1]
    if picture.live.keys() & set(entry.key.split("/")):
        return False
    if entry.upload is not None:
        store.discard(entry.upload)
        return True
    if entry.what not in ("artifact", "unfinished publication", "checkpoints"):
        store.delete(entry.key)
        return True
    with _leased(store, fingerprint, seen=picture.generations.get(fingerprint, 0)) as ours:
        if not ours or store.exists(f"{entry.key}/{MANIFEST}"):
            return False
        store.delete(entry.key)
        return True


class _Busy(Exception):
    """Another process holds the lease."""


@contextmanager
def _leased(store: Store, fingerprint: str, *, seen: int) -> Iterator[bool]:
    """Hold the lease on a fingerprint so that no build of it begins; yields False at once when one is running.

    `seen` is the newest generation in the listing, which was dead. The lease is released as after a failed build, so
    the next builder need not wait.
    """

    def busy(holder: Owner, seconds: float) -> None:
        raise _Busy

    name = "garbage-collection"
    owner = Owner(
        run_id=name,
        run_name=name,
        airflow_url="",
        submission_id="",
        host=platform.node(),
        pid=os.getpid(),
        since=utc_now(),
    )
    dead_is_dead = LeaseTimes(stale_seconds=LeaseTimes.stale_seconds if _begun(store, fingerprint, seen) else 0.0)
    try:
        lease = acquire(store, kind=name, fingerprint=fingerprint, owner=owner, times=dead_is_dead, on_wait=busy)
    except _Busy:
        yield False
        return
    assert lease is not None  # no artifact is of this kind
    try:
        with lease:
            yield True
            raise _Busy  # ends the lease as a failure: released for the next builder, not removed as after success
    except _Busy:
        pass


def _begun(store: Store, fingerprint: str, seen: int) -> bool:
    """Whether there is a newer lease than the one in the listing."""
    return store.exists(f"leases/{fingerprint}/{seen + 1}.json")
