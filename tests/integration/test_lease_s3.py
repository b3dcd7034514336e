"""The lease on a real S3-compatible server: its conditional put has one winner, and a sleeper is fenced."""

import threading

import pytest

from stages.lease import LeaseLostError
from stages.store import open_store
from tests.unit.test_lease import IDENTITY, held, publish_empty, take

pytestmark = pytest.mark.integration


def test_one_of_many_builds_on_s3_and_a_holder_that_slept_is_fenced(s3_store: str):
    store = open_store(f"{s3_store}/prefix")
    sleeper = held(store, "sleeper")  # holds, and does not beat
    built: list[str] = []
    start = threading.Barrier(6)

    def need(run: str) -> None:
        mine = open_store(f"{s3_store}/prefix")
        start.wait()
        lease = take(mine, run)
        if lease is not None:
            with lease:
                built.append(run)
                with pytest.raises(LeaseLostError, match="is being built by run run-"):
                    sleeper.check()
                lease.check()
                publish_empty(mine)

    threads = [threading.Thread(target=need, args=(f"run-{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    with pytest.raises(LeaseLostError, match="has been published"):
        sleeper.check()
    assert list(store.list(f"leases/{IDENTITY}")) == []
