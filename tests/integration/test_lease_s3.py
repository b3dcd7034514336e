"""The lease on a real S3-compatible server: one publishes, and a holder that slept is fenced."""

import threading
import time

import pytest

from stages.lease import LeaseLostError
from stages.store import open_store
from tests.conftest import enter
from tests.s3 import S3Server
from tests.unit.test_lease import IDENTITY, held, publish_empty, take

pytestmark = pytest.mark.integration


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
