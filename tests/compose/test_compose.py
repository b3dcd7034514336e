"""`tiny` from Airflow's REST API to a registered model, on the containers of docker-compose.yml."""

from __future__ import annotations

import json
from typing import Any

import httpx
import psutil
import pytest

from tests.canaries import airflow_answers, as_login, as_text
from tests.compose.conftest import tasks
from tests.compose.deployment import Deployment
from tests.pipeline_records import PLAIN_RUN

pytestmark = [pytest.mark.compose, pytest.mark.timeout(5400)]

DATABASES = ("airflow", "mlflow", "mlflow_auth")
ONE_SHOTS = {"setup-databases", "setup-bucket", "setup-airflow", "setup-mlflow", "migrate-mlflow"}

MANIFESTS = """
import json, os
from stages.artifacts.addresses import open_store
store = open_store(os.environ["ARTIFACT_STORE"])
keys = [entry.key for entry in store.listing()]
manifests = {key: json.loads(store.read_bytes(key)) for key in keys if key.endswith("/manifest.json")}
print(json.dumps({"keys": keys, "manifests": manifests}))
"""

# every object of the bucket, MLflow's artifacts included, searched for each needle inside the container: the bodies of
# models need not travel
SEARCH_STORE = """
import boto3, json, os, sys
from botocore.config import Config
needles = json.loads(os.environ["NEEDLES"])
bucket = os.environ["ARTIFACT_STORE"].split("/")[2]
s3 = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
found, seen = [], 0
for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):
    for entry in page.get("Contents", ()):
        body = s3.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
        seen += 1
        found += [(name, entry["Key"]) for name, needle in needles.items() if needle.encode() in body]
print(json.dumps({"seen": seen, "found": found}))
"""

SEARCH_LOGS = """
import json, os, pathlib
needles = json.loads(os.environ["NEEDLES"])
files = [file for file in pathlib.Path("/opt/airflow/logs").rglob("*") if file.is_file()]
found = [(n, str(f)) for f in files for n, needle in needles.items() if needle.encode() in f.read_bytes()]
print(json.dumps({"seen": len(files), "found": found}))
"""

SEARCH_RAY_LOGS = SEARCH_LOGS.replace("/opt/airflow/logs", "/tmp/ray")


def test_tiny_runs_from_end_to_end(deployed: Deployment, run_id: str) -> None:
    states = tasks(deployed, run_id)
    assert {stage: states[stage] for stage in PLAIN_RUN} == dict.fromkeys(PLAIN_RUN, "success")


def test_every_service_is_healthy_and_every_one_shot_ended_well(deployed: Deployment) -> None:
    states = {c["Config"]["Labels"]["com.docker.compose.service"]: c["State"] for c in deployed.containers()}
    assert {name for name, state in states.items() if state["Status"] == "exited"} == ONE_SHOTS
    assert not [name for name in ONE_SHOTS if states[name]["ExitCode"]]
    servers = states.keys() - ONE_SHOTS
    assert {name: states[name]["Health"]["Status"] for name in servers} == dict.fromkeys(servers, "healthy")


def test_the_model_is_registered_in_mlflow_behind_a_login(deployed: Deployment, run_id: str) -> None:
    address = f"{deployed.mlflow_url}/api/2.0/mlflow/registered-models/search"
    assert httpx.get(address, timeout=10).status_code == 401
    login = ("athanor", deployed.values["MLFLOW_PASSWORD"])
    models = httpx.get(address, auth=login, timeout=10).json()["registered_models"]
    aligned = next(model for model in models if model["name"].endswith("-aligned"))
    assert {alias["alias"] for alias in aligned["aliases"]} >= {"candidate"}
    refused = httpx.post(
        f"{deployed.mlflow_url}/api/2.0/mlflow/users/create",
        auth=login,
        timeout=10,
        json={"username": "x", "password": "y" * 20},
    )
    assert refused.status_code == 403, "the pipeline's account is an administrator"


def test_artifacts_are_in_s3_with_the_commit_of_the_image(deployed: Deployment, run_id: str) -> None:
    seen = deployed.inside("airflow-scheduler", MANIFESTS)
    assert {manifest["stage"] for manifest in seen["manifests"].values()} == {stage.value for stage in PLAIN_RUN}
    assert {manifest["execution"]["git_commit"] for manifest in seen["manifests"].values()} == {deployed.commit}
    for key, manifest in seen["manifests"].items():
        folder = key.removesuffix("/manifest.json")
        assert {f"{folder}/{file['path']}" for file in manifest["files"]} <= set(seen["keys"])


def test_airflow_and_ray_refuse_who_has_no_key(deployed: Deployment, run_id: str) -> None:
    assert httpx.get(f"{deployed.airflow_url}/api/v2/dags", timeout=10).status_code == 401
    assert httpx.get(f"{deployed.ray_url}/api/jobs/", timeout=10).status_code == 401
    held = {"Authorization": f"Bearer {deployed.values['RAY_TOKEN']}"}
    assert httpx.get(f"{deployed.ray_url}/api/jobs/", headers=held, timeout=10).status_code == 200


def test_programs_run_as_nobody_in_particular(deployed: Deployment) -> None:
    for container in deployed.containers():
        labels = container["Config"]["Labels"]
        assert container["HostConfig"]["CapDrop"] == ["ALL"], container["Name"]
        if (service := labels["com.docker.compose.service"]) in ("postgres", "s3"):
            assert container["Config"]["User"] == {"postgres": "999:999", "s3": "1000:1000"}[service]
            assert container["HostConfig"]["ReadonlyRootfs"] is (service == "postgres")
            continue
        assert container["Config"]["User"] == "10001:10001", container["Name"]
        assert labels["org.opencontainers.image.revision"] == deployed.commit
        assert not container["HostConfig"]["Privileged"]


def test_airflow_has_neither_torch_nor_ray(deployed: Deployment) -> None:
    program = """
import importlib.util, json
print(json.dumps([name for name in ("torch", "ray", "mlflow", "transformers") if importlib.util.find_spec(name)]))
"""
    assert deployed.inside("airflow-scheduler", program) == []


def test_only_loopback_listens(deployed: Deployment) -> None:
    """What the engine says it published, and what the kernel says listens on those ports."""
    published: list[tuple[str, int]] = []
    for container in deployed.containers():
        for bindings in (container["NetworkSettings"]["Ports"] or {}).values():
            published += [(binding["HostIp"], int(binding["HostPort"])) for binding in bindings or ()]
    wanted = {int(deployed.values[name]) for name in ("AIRFLOW_PORT", "MLFLOW_PORT", "RAY_PORT")}
    assert {port for _, port in published} == wanted
    assert {address for address, _ in published} == {"127.0.0.1"}
    listening = {
        (entry.laddr.ip, entry.laddr.port)
        for entry in psutil.net_connections("tcp")
        if entry.laddr and entry.status == psutil.CONN_LISTEN and entry.laddr.port in wanted
    }
    assert listening == {("127.0.0.1", port) for port in wanted}


# ----------------------------------------------------------------- canaries


def test_no_secret_is_anywhere_it_could_be_read(deployed: Deployment, run_id: str) -> None:
    """Every secret of `.env` is a canary: random, used nowhere else, and so are its base64 forms in logins."""
    needles = canaries(deployed)
    places = {
        "container logs": deployed.compose("logs", "--no-color", seconds=300),
        "process arguments": json.dumps([[c["Args"], c["Config"]["Cmd"]] for c in deployed.containers()]),
        "image histories": image_histories(deployed),
        "Airflow, over its API": airflow_text(deployed, run_id),
        "Ray's jobs": json.dumps(ray_jobs(deployed)),
        "MLflow's runs, models and versions": json.dumps(mlflow_records(deployed)),
        **{f"database {name}": database_text(deployed, name) for name in DATABASES},
    }
    found = [(place, name) for place, text in places.items() for name, needle in needles.items() if needle in text]
    assert all(len(text) > 200 for text in places.values()), {place: len(text) for place, text in places.items()}
    for service, program, least in (
        ("airflow-scheduler", SEARCH_STORE, 50),
        ("airflow-scheduler", SEARCH_LOGS, 10),
        ("ray-head", SEARCH_RAY_LOGS, 10),
    ):
        seen = search_inside(deployed, service, program, needles)
        assert seen["seen"] >= least, f"{service}: only {seen['seen']} objects were searched"
        found += [(service, *entry) for entry in seen["found"]]
    assert found == []


def test_the_search_finds_a_secret_that_is_there(deployed: Deployment, run_id: str) -> None:
    """A canary test that cannot fail is none: this one plants a word and looks for it in the same way."""
    planted = {"planted": "llm_pipeline"}  # in every task log and in the manifests of runs
    assert search_inside(deployed, "airflow-scheduler", SEARCH_LOGS, planted)["found"]
    assert search_inside(deployed, "airflow-scheduler", SEARCH_STORE, planted)["found"]
    assert "llm_pipeline" in airflow_text(deployed, run_id)
    assert "athanor-" in json.dumps(ray_jobs(deployed))
    assert "llm_pipeline" in database_text(deployed, "airflow")
    assert "lineage.stage" in database_text(deployed, "mlflow")


def canaries(deployed: Deployment) -> dict[str, str]:
    needles = dict(deployed.secrets)
    needles.pop("S3_ACCESS_KEY")  # a name, not a secret: it is in every signed request
    for user, name in (("athanor", "MLFLOW_PASSWORD"), ("admin", "MLFLOW_ADMIN_PASSWORD")):
        needles[f"{name}, as a login"] = as_login(user, needles[name])
    return needles


def search_inside(deployed: Deployment, service: str, program: str, needles: dict[str, str]) -> Any:
    words = ("exec", "--no-TTY", "--env", f"NEEDLES={json.dumps(needles)}", service, "python", "-c", program)
    return json.loads(deployed.compose(*words, seconds=600).splitlines()[-1])


def database_text(deployed: Deployment, name: str) -> str:
    """Everything in a database: XComs, rendered templates, audit log; params and tags; accounts, whose passwords are
    hashed or encrypted."""
    dump = ("pg_dump", "--username", "postgres", "--data-only", name)
    return deployed.compose("exec", "--no-TTY", "postgres", *dump, seconds=300)


def airflow_text(deployed: Deployment, run_id: str) -> str:
    connection = deployed.airflow.call("GET", "connections/ray_default")
    assert connection["host"] == "http://ray-head:8265"
    return as_text([connection, *airflow_answers(deployed.airflow.call, "llm_pipeline", run_id)])


def ray_jobs(deployed: Deployment) -> Any:
    held = {"Authorization": f"Bearer {deployed.values['RAY_TOKEN']}"}
    jobs = httpx.get(f"{deployed.ray_url}/api/jobs/", headers=held, timeout=30).json()
    assert len(jobs) >= len(PLAIN_RUN)
    return jobs


def mlflow_records(deployed: Deployment) -> list[Any]:
    login = ("admin", deployed.values["MLFLOW_ADMIN_PASSWORD"])
    base = f"{deployed.mlflow_url}/api/2.0/mlflow"
    search = {"max_results": 1000}
    experiments = httpx.post(f"{base}/experiments/search", json=search, auth=login, timeout=30).json()["experiments"]
    ids = [experiment["experiment_id"] for experiment in experiments]
    answers = [
        httpx.post(f"{base}/runs/search", json={"experiment_ids": ids, **search}, auth=login, timeout=60),
        httpx.post(f"{base}/logged-models/search", json={"experiment_ids": ids}, auth=login, timeout=60),
        httpx.get(f"{base}/registered-models/search", auth=login, timeout=30),
        httpx.get(f"{base}/model-versions/search", auth=login, timeout=30),
    ]
    assert all(answer.is_success for answer in answers), [answer.text[:300] for answer in answers]
    assert len(answers[0].json()["runs"]) > len(PLAIN_RUN)
    return [answer.json() for answer in answers]


def image_histories(deployed: Deployment) -> str:
    images = {container["Config"]["Image"] for container in deployed.containers()}
    return "".join(
        deployed.engine.docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image) for image in images
    )
