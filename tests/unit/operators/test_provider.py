"""What Airflow learns about this package, and that DAGs with its operator survive serialisation."""

import json
import pkgutil
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
from airflow.api_fastapi.core_api.datamodels.connections import ConnectionResponse
from airflow.models import Connection
from airflow.sdk import DAG
from airflow.serialization.serialized_objects import DagSerialization

from operators.endpoint import EndpointHook
from operators.get_provider_info import get_provider_info
from operators.operator import StageOperator
from operators.prepare import pipeline_key
from operators.ray.hook import RayJobHook
from stages.config.graph import GRAPH, Stage
from stages.config.request import run_folder

INFO = get_provider_info()


def test_the_information_follows_airflows_schema():
    schema = json.loads(files("airflow").joinpath("provider_info.schema.json").read_text())
    jsonschema.validate(INFO, schema)


def test_the_entry_point_leads_here():
    found = [point for point in entry_points(group="apache_airflow_provider") if point.value.startswith("operators.")]
    assert [point.load()() for point in found] == [INFO]


def test_everything_that_is_named_exists():
    modules = [
        name for kind in ("operators", "hooks", "triggers") for entry in INFO[kind] for name in entry["python-modules"]
    ]
    for name in modules:
        __import__(name)
    for path in INFO["extra-links"]:
        pkgutil.resolve_name(path)
    for connection, hook in zip(INFO["connection-types"], (RayJobHook, EndpointHook), strict=True):
        assert pkgutil.resolve_name(connection["hook-class-name"]) is hook
        assert (connection["connection-type"], connection["hook-name"]) == (hook.conn_type, hook.hook_name)


def test_fields_that_may_hold_secrets_are_marked():
    fields = INFO["connection-types"][0]["conn-fields"]
    assert fields["secret_headers"]["schema"]["format"] == "password"


def test_airflows_api_shows_no_secret_of_a_connection():
    """What is masked is a matter of names: a field that the form hides may be open in the API."""
    extra = {"secret_headers": json.dumps({"X-Proxy": "canary-header"}), "dashboard_url": "https://ray.example.org"}
    connection = Connection("ray", conn_type="ray_jobs", host="head", password="canary-token", extra=json.dumps(extra))
    shown = ConnectionResponse.model_validate(connection, from_attributes=True).model_dump_json()
    assert "https://ray.example.org" in shown
    assert "canary" not in shown


def test_airflow_lists_the_provider_and_its_connection_type():
    from airflow.providers_manager import ProvidersManager
    from airflow.sdk.providers_manager_runtime import ProvidersManagerTaskRuntime

    manager = ProvidersManager()
    assert manager.providers["athanor"].data["name"] == "Athanor"
    hooks = ProvidersManagerTaskRuntime().hooks
    for kind in (RayJobHook, EndpointHook):
        hook = hooks[kind.conn_type]
        assert hook is not None
        assert hook.hook_name == kind.hook_name
    assert {path for path in manager.extra_links_class_names if path.startswith("operators.")} == set(
        INFO["extra-links"]
    )


def round_trip(**arguments: Any) -> Any:
    with DAG("probe", schedule=None) as dag:
        StageOperator(**arguments)
    encoded = json.loads(json.dumps(DagSerialization.to_dict(dag)))
    return DagSerialization.from_dict(encoded).task_dict[arguments["stage"].value]


@pytest.mark.parametrize("stage", Stage)
def test_the_operator_survives_serialisation(stage: Stage):
    task = round_trip(stage=stage, pool="gpu", retries=3)
    assert task.task_type == "StageOperator"
    assert (task.pool, task.retries) == ("gpu", 3)
    assert [asset.name for asset in task.outlets] == [GRAPH[stage].asset] * bool(GRAPH[stage].asset)
    links = ["Ray job", "MLflow run", "Artifact"] + ["Report"] * bool(GRAPH[stage].page)
    assert [link.name for link in task.operator_extra_links] == links


def test_templates_reach_the_serialised_task():
    task = round_trip(stage=Stage.SFT, entrypoint="python3.12 -m stages {config_uri}", store_uri="s3://b/{{ ds }}")
    assert (task.entrypoint, task.store_uri) == ("python3.12 -m stages {config_uri}", "s3://b/{{ ds }}")


def test_an_unknown_stage_is_refused_when_the_dag_is_read():
    with pytest.raises(ValueError, match="'deploy' is not a valid Stage"):
        StageOperator(stage="deploy")


def test_run_ids_are_safe_as_keys():
    run_id = run_folder("d", "manual__2026-01-01T00:00:00+00:00/../x")
    assert run_id == "manual__2026-01-01T00-00-00-00-00-..-x-ccd2ec00d514"
    assert pipeline_key(run_id) == f"runs/{run_id}/pipeline.json"
