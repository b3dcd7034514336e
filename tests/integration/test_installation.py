"""`athanor[airflow]` in somebody else's Airflow: our wheel in a fresh environment, without torch, ray and MLflow."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.places import REPOSITORY

pytestmark = [pytest.mark.live, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

UV = Path(sys.executable).with_name("uv")
# what uv says when it reaches no package index; any other failure is ours
OFFLINE = ("dns error", "error sending request", "Could not connect", "tcp connect error", "Network is unreachable")

PROBE = """
import importlib.util, json, pkgutil, sys
from importlib import import_module

import dags, operators
from airflow.dag_processing.dagbag import DagBag
from airflow.serialization.serialized_objects import DagSerialization

modules = [found.name for package in (operators, dags)
           for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.") if not found.ispkg]
for name in modules:
    import_module(name)
bag = DagBag(dags.__path__[0])
tasks = {}
for dag_id, dag in bag.dags.items():
    there = json.dumps(DagSerialization.to_dict(dag))
    back = DagSerialization.from_dict(json.loads(there))
    tasks[dag_id] = {task.task_id: [task.task_type, [link.name for link in task.operator_extra_links]]
                     for task in back.tasks}
heavy = ("torch", "ray", "mlflow", "transformers", "datasets", "datatrove", "deepspeed", "numpy")
print("PROBE", json.dumps({
    "modules": modules,
    "where": [operators.__file__, dags.__file__],
    "import_errors": bag.import_errors,
    "tasks": tasks,
    "importable": [name for name in heavy if importlib.util.find_spec(name)],
}))
"""


@dataclass(frozen=True)
class Elsewhere:
    """A Python environment that is not ours, and a place to stand that is not the checkout."""

    venv: Path
    home: Path

    def run(self, *command: str) -> str:
        settings = {
            "PATH": f"{self.venv / 'bin'}{os.pathsep}{os.defpath}",
            "HOME": str(self.home),
            "AIRFLOW_HOME": str(self.home / "airflow"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
            "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "false",
        }
        done = subprocess.run(
            [str(self.venv / "bin" / command[0]), *command[1:]],
            env=settings,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{' '.join(command[:3])}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout


def uv(*arguments: str | Path) -> None:
    done = subprocess.run([UV, *arguments], capture_output=True, text=True, timeout=420)
    if done.returncode and any(sign in done.stderr for sign in OFFLINE):
        pytest.skip(f"no package index within reach: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    folder = tmp_path_factory.mktemp("elsewhere")
    links = ["--find-links", os.environ["PIP_FIND_LINKS"]] if os.environ.get("PIP_FIND_LINKS") else []
    uv("build", "--quiet", "--wheel", *links, "--out-dir", folder / "dist", REPOSITORY)
    (wheel,) = (folder / "dist").glob("athanor-*.whl")
    venv, home = folder / "venv", folder / "home"
    home.mkdir()
    uv("venv", "--quiet", "--python", sys.executable, venv)
    constraints = REPOSITORY / "constraints.txt"
    wanted = f"athanor[airflow] @ {wheel.as_uri()}"
    uv("pip", "install", "--quiet", "--python", venv / "bin" / "python", "--constraint", constraints, *links, wanted)
    return Elsewhere(venv, home)


@pytest.fixture(scope="module")
def probe(elsewhere: Elsewhere) -> dict[str, Any]:
    (line,) = [line for line in elsewhere.run("python", "-c", PROBE).splitlines() if line.startswith("PROBE ")]
    return json.loads(line.removeprefix("PROBE "))


def test_no_training_library_comes_along(probe: dict[str, Any]) -> None:
    assert probe["importable"] == []


def test_every_operator_module_and_every_dag_can_be_imported_from_the_wheel(
    probe: dict[str, Any], elsewhere: Elsewhere
) -> None:
    assert all(path.startswith(str(elsewhere.venv)) for path in probe["where"]), "not the checkout's"
    assert set(probe["modules"]) == {module for name in ("operators", "dags") for module in modules_of(name)}
    assert probe["import_errors"] == {}


def modules_of(name: str) -> list[str]:
    files = [file for file in (REPOSITORY / name).rglob("*.py") if file.stem != "__init__"]
    return [".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files]


def test_the_dags_survive_serialisation_with_operators_and_links(probe: dict[str, Any]) -> None:
    tasks = probe["tasks"]
    assert set(tasks) == {
        "llm_pipeline",
        "retrain",
        "evaluate_model",
        "collect_preferences",
        "reap_orphans",
        "rollback",
    }
    assert tasks["llm_pipeline"]["report"] == ["StageOperator", ["Ray job", "MLflow run", "Artifact", "Report"]]
    assert tasks["llm_pipeline"]["approve"][0] == "PromotionApproval"
    assert tasks["llm_pipeline"]["review"][0] == "MadeDataReview"
    assert tasks["collect_preferences"]["rate"][0] == "PreferenceRating"


def test_airflow_lists_the_provider_and_its_connection_type(elsewhere: Elsewhere) -> None:
    providers = json.loads(elsewhere.run("airflow", "providers", "list", "--output", "json"))
    assert [entry["version"] for entry in providers if entry["package_name"] == "athanor"] == ["0.1.0"]
    hooks = json.loads(elsewhere.run("airflow", "providers", "hooks", "--output", "json"))
    assert [entry["class"] for entry in hooks if entry["connection_type"] == "ray_jobs"] == [
        "operators.ray.hook.RayJobHook"
    ]
