"""Every run has a folder of its own under `runs/`, whatever its id and its DAG are called, also across an upgrade."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from operators.dispatch import of_mapped
from operators.failures import StageConfigFailed, StageDataFailed
from operators.mlflow import open_parent_run
from operators.prepare import load_config, params_key, pipeline_key
from operators.run import start_run
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.store import Store, write_json
from stages.config.graph import Stage
from stages.config.request import RunInfo, safe_run_id
from tests.answering import Asked, answering_json
from tests.places import SHARED

COLLIDING = ("exp-1", "exp+1", "exp:1", "exp~1", "EXP-1")
OLD_ID = "nightly+2026"
OLD_FOLDER = "nightly-2026"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    monkeypatch.setenv("ARTIFACT_STORE", tmp_path.as_uri())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return open_store(tmp_path.as_uri())


def start(run_id: str, dag_id: str = "llm_pipeline", **params: Any) -> RunInfo:
    ti = SimpleNamespace(dag_id=dag_id, run_id=run_id, log_url="http://airflow/dags/x/runs/y/tasks/resolve")
    return RunInfo.model_validate(start_run({"ti": ti, "params": {"recipe": "tiny", **params}}))


def old_run(store: Store, run_id: str = OLD_ID, dag_id: str = "llm_pipeline") -> None:
    """What the version before left of a run whose first stage has begun."""
    run = {"run_id": OLD_FOLDER, "name": "tiny", "dag_id": dag_id, "airflow_run_id": run_id}
    write_json(store, run_key(OLD_FOLDER, Stage.CURATE, "config.json"), {"stage": "curate", "run": run})
    store.write_bytes(pipeline_key(OLD_FOLDER), b"{}")
    write_json(store, params_key(OLD_FOLDER), {"recipe": "tiny", "seed": 1})


def test_run_ids_that_differ_in_any_character_or_in_their_dag_have_folders_of_their_own(store: Store) -> None:
    runs = [start(run_id, seed=number) for number, run_id in enumerate(COLLIDING)]
    runs += [start(run_id, "other_dag", seed=10 + number) for number, run_id in enumerate(COLLIDING)]
    folders = {run.run_id.lower() for run in runs}  # some file systems do not tell capitals apart
    assert len(folders) == len(runs)
    assert [load_config(store, run).curate.seed for run in runs] == [*range(5), *range(10, 15)]
    assert all(run.run_id.startswith("exp-1-") for run in runs[:4]), "people must recognise it"


def test_the_four_run_ids_from_the_field_have_four_folders() -> None:
    path = SHARED / "cases" / "world" / "13_addresses.json"
    if not path.exists():
        pytest.skip("needs the cases that lie next to the repository")
    ids = json.loads(path.read_text())["run_ids_of_one_dag"]
    assert len({start(run_id).run_id for run_id in ids}) == len(ids) == 4


def test_a_folder_is_one_name_of_bounded_length_whatever_the_run_is_called(store: Store) -> None:
    for run_id in ("..", ".", "../../x", "a/../b", "x" * 250, "ü" * 250, "$(x)", "a\nb", ""):
        run = start(run_id)
        assert not set(run.run_id) & set("/\\ \n$()ü"), run_id
        assert run.run_id[0].isalnum(), "no option of a command, no hidden folder"
        assert len(of_mapped(run, 999_999).run_id) < 200
        assert store.exists(pipeline_key(run.run_id))


def test_instances_of_a_mapped_task_meet_no_other_run() -> None:
    """`x.3` is the third instance of run `x`, and a run may be called so too."""
    assert of_mapped(start("x"), 3).run_id != start("x.3").run_id
    assert of_mapped(start("x"), 3).run_id != start(of_mapped(start("x"), 3).run_id).run_id


def test_the_same_run_comes_back_to_its_folder_when_resolve_is_cleared() -> None:
    assert start("again", seed=1).run_id == start("again", seed=2).run_id


def test_records_of_another_run_are_not_overwritten(store: Store) -> None:
    folder = start("a").run_id
    owner = f"runs/{folder}/owner.json"
    write_json(store, owner, {"dag_id": "llm_pipeline", "airflow_run_id": "b"})
    before = store.read_bytes(pipeline_key(folder))
    with pytest.raises(StageConfigFailed, match=rf"runs/{folder} belongs to run 'b' of DAG 'llm_pipeline'"):
        start("a", seed=9)
    assert store.read_bytes(pipeline_key(folder)) == before


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "null", '{"dag_id": 3}', "[" * 100_000, "\x00"])
def test_a_record_of_the_owner_that_cannot_be_read_is_named(store: Store, text: str) -> None:
    owner = f"runs/{start('a').run_id}/owner.json"
    store.write_bytes(owner, text.encode())
    with pytest.raises(StageDataFailed, match=rf"{owner} does not say whose records these are"):
        start("a")


def test_a_run_of_before_that_is_cleared_resumes_in_its_folder(store: Store) -> None:
    old_run(store)
    assert start(OLD_ID).run_id == OLD_FOLDER
    assert start(OLD_ID).run_id == OLD_FOLDER
    others = {start("nightly-2026").run_id, start("nightly:2026").run_id, start(OLD_ID, "other_dag").run_id}
    assert OLD_FOLDER not in others
    assert len(others) == 3


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": []}', '{"run": {"dag_id": 1}}', "[" * 100_000])
def test_a_folder_of_before_whose_records_do_not_tell_the_run_is_left_alone(store: Store, text: str) -> None:
    old_run(store)
    store.write_bytes(run_key(OLD_FOLDER, Stage.CURATE, "config.json"), text.encode())
    assert start(OLD_ID).run_id != OLD_FOLDER


def test_a_folder_of_before_that_two_runs_shared_is_left_alone(store: Store) -> None:
    old_run(store)
    run = {"run_id": OLD_FOLDER, "name": "tiny", "dag_id": "llm_pipeline", "airflow_run_id": "nightly~2026"}
    write_json(store, run_key(OLD_FOLDER, Stage.SFT, "config.json"), {"run": run})
    assert start(OLD_ID).run_id != OLD_FOLDER


class Mlflow:
    """MLflow's search and creation of runs, in memory."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.address = ""

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("experiments/get-by-name"):
            return {"experiment": {"experiment_id": "1"}}
        if path.endswith("runs/search"):
            wanted = body["filter"].split("'")[1]
            return {
                "runs": [run for run in self.runs if {"key": "athanor.run_id", "value": wanted} in run["data"]["tags"]]
            }
        if path.endswith("runs/create"):
            self.add(body["tags"])
            return {"run": self.runs[-1]}
        return {}

    def add(self, tags: list[dict[str, str]]) -> None:
        self.runs.append({"info": {"run_id": f"m{len(self.runs)}"}, "data": {"tags": tags}})


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mlflow]:
    world = Mlflow()

    def answer(asked: Asked) -> tuple[int, Any]:
        return 200, world.answer(asked.path.split("?")[0], asked.value or {})

    with answering_json(answer) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        yield world


def test_runs_whose_ids_look_alike_have_mlflow_runs_of_their_own(mlflow: Mlflow) -> None:
    runs = [start(run_id) for run_id in COLLIDING] + [start("exp-1", "other_dag")]
    assert len({run.parent_run_id for run in runs}) == len(runs)
    assert start("exp-1").parent_run_id == runs[0].parent_run_id


def test_the_mlflow_run_of_a_run_of_before_is_found_and_that_of_another_is_not(mlflow: Mlflow, store: Store) -> None:
    def tags(run_id: str, dag_id: str) -> list[dict[str, str]]:
        told = {"athanor.run_id": OLD_FOLDER, "airflow.dag_id": dag_id, "airflow.run_id": run_id}
        return [{"key": key, "value": value} for key, value in told.items()]

    mlflow.add(tags("nightly-2026", "other_dag"))
    mlflow.add(tags(OLD_ID, "llm_pipeline"))
    old_run(store)
    assert start(OLD_ID).parent_run_id == "m1"
    other = RunInfo(run_id=OLD_FOLDER, name="n", dag_id="llm_pipeline", airflow_run_id="nightly:2026")
    assert open_parent_run(other) == "m2"


def test_old_names_of_folders_stay_known() -> None:
    assert safe_run_id("manual__2026-01-01T00:00:00+00:00") == "manual__2026-01-01T00-00-00-00-00"


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a\nb", "a'b", "a b"])
def test_a_record_cannot_name_a_folder_elsewhere(name: str) -> None:
    with pytest.raises(ValueError, match="run_id"):
        RunInfo(run_id=name, name="n")
