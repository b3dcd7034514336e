"""The lease on every kind of store: of eight that need an artifact one publishes, and a holder that slept is fenced."""

import multiprocessing
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from stages.artifacts.addresses import open_store
from stages.artifacts.lease import LeaseLostError, LeaseTimes
from stages.artifacts.manifests import content_digest, find_manifest, publish, upload_files, verify
from tests.conftest import enter
from tests.s3 import S3Server
from tests.unit.artifacts.test_lease import IDENTITY, KIND, held, publish_empty, take
from tests.unit.artifacts.test_manifests import manifest

pytestmark = pytest.mark.integration

PUBLISHERS = 8
PATIENT = LeaseTimes(beat_seconds=0.5, stale_seconds=120, poll_seconds=0.2)
"""Nobody is taken for dead here, however busy the machine is."""


def need(number: int, environment: Mapping[str, str], store_uri: str, folder: Path, start, told) -> None:
    """What the runner does, with files like no other process's; a lost lease is tried again, as by Airflow."""
    os.environ.update(environment)  # the process that was forked is older than the test
    store, output = open_store(store_uri), folder / str(number)
    output.mkdir()
    (output / "a.txt").write_text(f"publisher {number}")
    begun = published = 0
    start.wait(120)
    while (lease := take(store, f"run-{number}", PATIENT)) is not None:
        begun += 1
        try:
            with lease:
                time.sleep(0.5)  # the build
                lease.check()
                files = upload_files(store, output, kind=KIND, fingerprint=IDENTITY)
                lease.check()
                mine = manifest(files, identity=IDENTITY)
                assert publish(store, mine).digest == mine.digest
                published += 1
        except LeaseLostError:
            pass
    found = find_manifest(store, KIND, IDENTITY)
    told.put((number, begun, published, found.digest if found else ""))


def test_of_eight_processes_with_a_lease_exactly_one_publishes_on_every_store(
    every_store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # Processes of their own, forked from one that has imported this file: that is what costs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    environment = dict(os.environ)
    start, told = context.Barrier(PUBLISHERS), context.Queue()
    processes = [
        context.Process(target=need, args=(number, environment, every_store, tmp_path, start, told), daemon=True)
        for number in range(PUBLISHERS)
    ]
    for process in processes:
        process.start()
    answers = [told.get(timeout=200) for _ in processes]
    for process in processes:
        process.join()
    winners = [(number, digest) for number, _, published, digest in answers if published]
    assert len(winners) == 1
    assert {digest for *_, digest in answers} == {winners[0][1]}
    store = open_store(every_store)
    found = find_manifest(store, KIND, IDENTITY)
    assert found is not None
    verify(store, found, hashes=True)  # nobody else's file lies under the winner's manifest
    assert found.digest == content_digest(found.files) == winners[0][1]
    assert list(store.list(f"leases/{IDENTITY}")) == []
    begun = sum(begun for _, begun, *_ in answers)
    assert begun == 1 or request.node.callspec.params["every_store"] == "swift"  # where several may begin


def test_one_of_many_publishes_on_s3_and_a_holder_that_slept_is_fenced(
    every_server: S3Server, monkeypatch: pytest.MonkeyPatch
):
    bucket = enter(every_server, monkeypatch)
    store = open_store(f"{bucket}/prefix")
    sleeper = held(store, "sleeper")  # holds, and does not beat
    published: list[str] = []
    lost: list[str] = []
    start = threading.Barrier(8)

    def need(run: str) -> None:
        mine = open_store(f"{bucket}/prefix")
        start.wait()
        try:
            lease = take(mine, run)
            if lease is not None:
                with lease:
                    time.sleep(0.5)  # the build
                    with pytest.raises(LeaseLostError, match="is being built by run run-"):
                        sleeper.check()
                    lease.check()
                    publish_empty(mine)
                    published.append(run)
        except LeaseLostError:
            lost.append(run)

    threads = [threading.Thread(target=need, args=(f"run-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(published) == 1
    assert not lost or every_server.kind == "swift"  # whose put-if-absent looks before it writes
    with pytest.raises(LeaseLostError, match="has been published"):
        sleeper.check()
    assert list(store.list(f"leases/{IDENTITY}")) == []
