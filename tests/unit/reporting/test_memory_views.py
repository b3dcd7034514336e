"""The table of memory by component in the report."""

from pathlib import Path

from stages.config.graph import Stage
from stages.config.memory import TrainingMemory
from stages.config.request import Manifest
from stages.reporting.memory_views import HEAD, memory_table
from tests.pipeline_records import publish_artifact, publish_run

MIB = 1 << 20


def manifest_with(tmp_path: Path, memory: TrainingMemory | None) -> Manifest:
    store, made = publish_run(tmp_path)
    folder = tmp_path / "content-dpo"
    recorded = {} if memory is None else {"memory": memory.model_dump(mode="json")}
    return publish_artifact(store, Stage.DPO, {"model": made[Stage.SFT]}, folder, salt="m", execution=recorded)[1]


def memory(rest: int | None) -> TrainingMemory:
    return TrainingMemory(
        device="cpu",
        parameters=2 * MIB,
        gradients=2 * MIB,
        optimizer=4 * MIB,
        frozen=0,
        libraries=100 * MIB,
        peak=120 * MIB,
        rest=rest,
    )


def test_each_component_stands_under_its_name_with_its_share_of_the_peak(tmp_path: Path) -> None:
    table = memory_table([manifest_with(tmp_path, memory(12 * MIB))])
    assert table is not None
    assert table.head == ("stage", "device", *HEAD)
    (row,) = table.rows
    assert [cell.text for cell in row] == [
        "dpo", "cpu", "2.0 MiB", "2.0 MiB", "4.0 MiB", "0 B", "12.0 MiB", "120.0 MiB",
    ]  # fmt: skip
    assert row[6].share == 0.1


def test_what_was_not_measured_is_a_dash_and_a_run_of_an_earlier_version_has_no_table(tmp_path: Path) -> None:
    table = memory_table([manifest_with(tmp_path, memory(None))])
    assert table is not None
    assert table.rows[0][6].text == "–"
    assert memory_table([manifest_with(tmp_path / "older", None)]) is None
