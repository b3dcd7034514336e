"""Records of progress: what was spent survives a killed attempt, and only what goes further counts as productive."""

import time
from pathlib import Path

import pytest

from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.store import Store, read_json
from stages.config.graph import Stage
from stages.config.heard import JOB_RECORD, worker_record
from stages.job.progress import Progress, read_progress
from tests.damaged import NO_JSON


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path.as_uri())


class Clock:
    """Stands in for `time.monotonic` where seconds are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("stages.job.progress.time.monotonic", lambda: self.now)

    def steps(self, progress: Progress, first: int, last: int) -> None:
        """One step a second."""
        for step in range(first, last + 1):
            self.now += 1.0
            progress(step, 100)


def test_steps_done_again_after_a_failure_are_not_productive(store: Store, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    killed = Progress(store, "r", Stage.SFT)
    clock.now += 7.0  # imports and loading
    killed.begin()
    clock.steps(killed, 1, 10)
    killed.close()
    assert killed.cost().productive_seconds == pytest.approx(10.0)
    resumed = Progress(store, "r", Stage.SFT)
    clock.now += 7.0
    resumed.begin()
    clock.steps(resumed, 6, 20)  # from the checkpoint of step 5
    clock.now += 3.0  # export
    cost = resumed.cost()
    assert cost.productive_seconds == pytest.approx(20.0)
    assert cost.wall_seconds == pytest.approx(17.0 + 25.0)
    assert cost.attempts == 2
    resumed.close()


def test_each_phase_starts_anew(store: Store, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    progress = Progress(store, "r", Stage.CURATE)
    for phase in ("hash", "filter"):
        for shard in (1, 2):
            clock.now += 1.0
            progress(shard, 2, unit="shard", phase=phase)
    assert progress.cost().productive_seconds == pytest.approx(4.0)
    progress.close()


def test_the_job_s_cost_has_that_of_its_workers(store: Store, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    job = Progress(store, "r", Stage.PRETRAIN, num_gpus=2)
    workers = [Progress(store, "r", Stage.PRETRAIN, record=worker_record(rank)) for rank in (0, 1)]
    clock.steps(workers[0], 1, 8)
    for worker in workers:
        worker.close()
    alone = sum(worker.cost().attempts for worker in workers)
    cost = job.cost()
    job.close()
    assert alone == 2
    assert cost.attempts == 1
    assert cost.productive_seconds == pytest.approx(8.0)
    assert cost.wall_seconds == pytest.approx(8.0)
    assert cost.gpu_seconds == pytest.approx(16.0)
    seen = read_json(store, run_key("r", Stage.PRETRAIN, JOB_RECORD))["cost"]
    noted = [read_json(store, run_key("r", Stage.PRETRAIN, worker_record(rank)))["cost"] for rank in (0, 1)]
    assert cost.cpu_seconds >= seen["cpu_seconds"] > 0
    assert cost.cpu_seconds > sum(cost["cpu_seconds"] for cost in noted) > 0
    assert seen["productive_seconds"] == 0, "workers are counted once, when the cost is asked for"


def test_others_read_the_first_worker_s_report_where_there_are_workers(store: Store):
    assert read_progress(store, "r", Stage.PRETRAIN).done is None
    job = Progress(store, "r", Stage.PRETRAIN)
    worker = Progress(store, "r", Stage.PRETRAIN, record=worker_record(0))
    worker(3, 10)
    worker.close()
    job.close()
    assert read_progress(store, "r", Stage.PRETRAIN).done == 3


def test_only_printed_leaves_nothing_in_the_store(store: Store, capsys: pytest.CaptureFixture[str]):
    progress = Progress(store, "r", Stage.SFT, record=None)
    progress(1, 2)
    time.sleep(0.05)
    progress.close()
    assert not list(store.listing())
    assert '"done": 1' in capsys.readouterr().out


RECORDS = [
    *NO_JSON,
    b'{"done": "three", "total": 10}',
    b'{"done": 1, "total": ' + b"1" * 5000 + b"}",
    b'{"done": 3, "total": NaN}',
    b'{"cost": {"wall_seconds": "long"}, "reached": {"step": []}}',
    b'{"cost": 3, "reached": 4, "done": 5}',
]


@pytest.mark.parametrize("record", RECORDS)
def test_a_damaged_record_of_a_job_or_a_worker_ends_no_work(
    store: Store, record: bytes, caplog: pytest.LogCaptureFixture
):
    for name in (JOB_RECORD, worker_record(0), worker_record(1)):
        store.write_bytes(run_key("r", Stage.PRETRAIN, name), record)
    assert read_progress(store, "r", Stage.PRETRAIN).done is None
    progress = Progress(store, "r", Stage.PRETRAIN)
    progress(1, 2)
    assert progress.cost().attempts == 1
    progress.close()
    assert f"runs/r/pretrain/{JOB_RECORD}" in caplog.text


def test_a_run_id_that_another_record_made_up_leads_nowhere(store: Store):
    assert read_progress(store, "../../x", Stage.PRETRAIN).done is None
