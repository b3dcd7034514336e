"""Which checkpoints stay, which one a resume uses, and which it refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.artifacts.addresses import open_store
from stages.artifacts.store import Store, read_json, write_json
from stages.config.errors import ConfigError, DataError
from stages.train.best import BestBy
from stages.train.checkpoint import Checkpoint, Checkpointer
from stages.train.objective import ObjectiveState
from stages.train.ranks import Processes
from stages.train.shards import Box, Piece

IDENTITY = "f" * 64
ENGINE = "engine-00000-of-00001.safetensors"
LOSS = BestBy("eval/loss", highest=False, every=2)
HISTORY: list[dict[str, Any]] = [
    {"step": 1, "train/loss": 9.0},
    {"step": 2, "train/loss": 8.0, "eval/loss": 5.0},
    {"step": 3, "train/loss": 1.0},
    {"step": 4, "train/loss": 7.0, "eval/loss": 3.0},
    {"step": 6, "train/loss": 6.0, "eval/loss": 3.0},
    {"step": 8, "train/loss": 5.0, "eval/loss": 4.0},
]


def at(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        engine={"w": Piece(Box.whole((3,)), torch.full((3,), float(step)))},
        objective=ObjectiveState({"cursor": step}, {"ids": torch.arange(step)}),
        guard={},
        history=[row for row in HISTORY if row["step"] <= step],
    )


def saved(store: Store, *steps: int, **options: Any) -> Checkpointer:
    checkpointer = Checkpointer(store, IDENTITY, processes=Processes(), **{"keep": 2, **options})
    for step in steps:
        checkpointer.save(at(step))
    checkpointer.wait()
    return checkpointer


def kept(store: Store) -> list[int]:
    return sorted({int(key.split("/")[2].removeprefix("step-")) for key in store.list("checkpoints")})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path.as_uri())


def test_the_best_step_is_the_earliest_of_equals_and_knows_its_direction() -> None:
    assert LOSS.step(HISTORY) == 4
    assert BestBy("eval/loss", highest=True, every=2).step(HISTORY) == 2
    assert LOSS.step(HISTORY[:1]) is None


def test_a_value_that_is_no_number_is_never_the_best() -> None:
    rows = [{"step": 2, "eval/loss": math.nan}, {"step": 4, "eval/loss": 7.0}]
    assert LOSS.step(rows) == 4


def test_a_metric_that_nobody_measures_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"best_metric='eval/accuracy' is not measured.*which measures: eval/loss"):
        BestBy("eval/accuracy", highest=True, every=2).step(HISTORY[:2])


def test_the_newest_and_the_best_checkpoints_stay(store: Store) -> None:
    checkpointer = saved(store, 2, 3, 4, 6, 8, best=LOSS)
    assert kept(store) == [4, 6, 8]
    best = checkpointer.best(at(8).history)
    assert best is not None
    assert best.engine.read("w", Box.whole((3,))).tolist() == [4.0, 4.0, 4.0]


def test_without_a_best_metric_only_the_newest_stay(store: Store) -> None:
    checkpointer = saved(store, 2, 3, 4, 6, 8)
    assert kept(store) == [6, 8]
    assert checkpointer.best(at(8).history) is None


def test_the_last_step_needs_no_checkpoint_to_be_the_best(store: Store) -> None:
    assert saved(store, 2, best=LOSS).best(at(4).history) is None


def files_of_newest(store: Store) -> list[str]:
    return [key for key in store.list("checkpoints") if "step-00000004" in key]


@pytest.mark.parametrize("name", [ENGINE, "objective.safetensors", "history.jsonl", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["first byte", "middle byte", "last byte", "short", "empty", "missing"])
def test_whatever_is_damaged_the_checkpoint_before_is_used(
    store: Store, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = saved(store, 3, 4)
    (key,) = [key for key in files_of_newest(store) if key.endswith(name)]
    data = bytearray(store.read_bytes(key))
    match damage:
        case "missing":
            store.delete(key)
        case "short" | "empty":
            store.write_bytes(key, bytes(data[: len(data) // 2 if damage == "short" else 0]))
        case _:
            position = {"first byte": 0, "middle byte": len(data) // 2, "last byte": -1}[damage]
            data[position] ^= 1
            store.write_bytes(key, bytes(data))
    latest = checkpointer.latest()
    assert latest is not None
    assert latest.step == 3
    assert latest.engine.read("w", Box.whole((3,))).tolist() == [3.0, 3.0, 3.0]
    if (name, damage) != ("checkpoint.json", "missing"):  # without its record it was never published
        assert "step-00000004 is damaged and passed over" in caplog.text


def test_a_cursor_that_changed_in_the_record_is_noticed(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = saved(store, 3, 4)
    (key,) = [key for key in files_of_newest(store) if key.endswith("checkpoint.json")]
    stored = read_json(store, key)
    write_json(store, key, {**stored, "record": {**stored["record"], "objective": {"cursor": 5}}})
    latest = checkpointer.latest()
    assert latest is not None
    assert latest.step == 3
    assert "checkpoint.json does not have the sha256 that it names" in caplog.text


def test_a_checkpoint_of_other_data_is_refused_with_the_reason(store: Store) -> None:
    saved(store, 2, trained_on={"tokens": "a" * 64, "order": "c" * 64, "num_steps": "8"})
    other = Checkpointer(
        store,
        IDENTITY,
        keep=2,
        processes=Processes(),
        trained_on={"tokens": "b" * 64, "order": "c" * 64, "num_steps": "6"},
    )
    with pytest.raises(DataError) as refused:
        other.latest()
    assert "num_steps was 8, is 6; tokens was aaaaaaaaaaaa, is bbbbbbbbbbbb" in refused.value.message
    assert f"delete {store.root_uri}/checkpoints/{IDENTITY}" in refused.value.advice


def test_the_same_origin_is_resumed(store: Store) -> None:
    origin = {"tokens": "a" * 64}
    saved(store, 2, trained_on=origin)
    latest = Checkpointer(store, IDENTITY, keep=2, processes=Processes(), trained_on=origin).latest()
    assert latest is not None
    assert latest.step == 2


class Counted:
    """A store that counts checkpoints whose first file has come and whose record has not."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.in_flight = self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def upload(self, path: Path, key: str) -> None:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        self._store.upload(path, key)

    def write_bytes(self, key: str, data: bytes) -> None:
        self._store.write_bytes(key, data)
        if key.endswith("checkpoint.json"):
            self.in_flight -= 1


def test_at_most_one_checkpoint_is_in_flight(store: Store) -> None:
    counted = Counted(store)
    checkpointer = Checkpointer(counted, IDENTITY, keep=2, processes=Processes())  # type: ignore[arg-type]
    for step in range(1, 30):
        checkpointer.save(at(step))
    checkpointer.wait()
    assert (counted.in_flight, counted.most) == (0, 1)
