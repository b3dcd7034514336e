"""Airflow's roles on a server, asked of a real API server with the auth manager of the deployments: who may rate and
approve, and what they can do besides. Its Airflow home is its own; no scheduler runs, questions are in the database.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from infra import ports
from tests.places import REPOSITORY
from tests.servers import running

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        importlib.util.find_spec("airflow.providers") is None
        or importlib.util.find_spec("airflow.providers.fab") is None,
        reason="apache-airflow-providers-fab is not installed; `make setup` installs it",
    ),
]

DAG = """
from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import DAG

with DAG(dag_id="asking", schedule=None):
    HITLOperator(task_id="rate", subject="Which is better?", options=["A", "B"])
    HITLOperator(task_id="again", subject="And now?", options=["A", "B"])
"""

# In a process of its own: Airflow reads its configuration when it is imported, and the tests' process has another.
SETTING = """
import datetime, sys
from airflow.models.dagbag import DBDagBag
from airflow.models.hitl import HITLDetail
from airflow.models import Variable
from airflow.providers.fab.auth_manager.cli_commands.utils import get_application_builder
from airflow.utils.session import create_session
from airflow.utils.state import TaskInstanceState
from airflow.utils.types import DagRunTriggeredByType, DagRunType

with get_application_builder() as builder:
    for role in ("Rater", "Viewer", "User"):
        made = builder.sm.add_user(role.lower(), role, "-", role + "@localhost", builder.sm.find_role(role), "password")
        assert made, role
Variable.set("planted", "secret")
now = datetime.datetime.now(datetime.timezone.utc)
with create_session() as session:
    dag = DBDagBag().get_latest_version_of_dag("asking", session=session)
    run = dag.create_dagrun(
        run_id="manual__1", logical_date=now, data_interval=(now, now), run_after=now, run_type=DagRunType.MANUAL,
        triggered_by=DagRunTriggeredByType.TEST, state="running", session=session,
    )
    session.flush()
    for ti in run.get_task_instances(session=session):
        ti.state = TaskInstanceState.AWAITING_INPUT
        session.add(HITLDetail(ti_id=ti.id, options=["A", "B"], subject="Which?", multiple=False, params={}))
"""


class Person:
    """Somebody who is logged in."""

    def __init__(self, url: str, name: str) -> None:
        answer = httpx.post(f"{url}/auth/token", json={"username": name, "password": "password"}, timeout=60)
        assert answer.status_code == 201, answer.text
        held = {"Authorization": f"Bearer {answer.json()['access_token']}"}
        self._client = httpx.Client(base_url=url, headers=held, timeout=60)

    def status(self, method: str, path: str, body: object = None) -> int:
        return self._client.request(method, path, json=body).status_code

    def get(self, path: str) -> dict:
        return self._client.get(path).raise_for_status().json()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("roles")
    (home / "dags").mkdir()
    (home / "dags" / "asking.py").write_text(DAG)
    port = ports.any_free()
    bundle = {
        "name": "dags",
        "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle",
        "kwargs": {"path": str(home / "dags")},
    }
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__AUTH_MANAGER": "infra.deploy.auth_manager.PeopleAuthManager",
        "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "false",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "false",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps([bundle]),
        "AIRFLOW__API__SECRET_KEY": "k" * 64,
        "AIRFLOW__API_AUTH__JWT_SECRET": "j" * 64,
        "AIRFLOW__API__WORKERS": "1",
    }

    def run(*words: str) -> None:
        done = subprocess.run(
            [sys.executable, *words], env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words[:3]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"

    run("-m", "airflow", "db", "migrate")
    run("-m", "airflow", "dags", "reserialize")
    run("-m", "infra.deploy.setup", "roles")
    run("-c", SETTING)
    url = f"http://127.0.0.1:{port}"
    with running(
        "api-server",
        (sys.executable, "-m", "airflow", "api-server", "--host", "127.0.0.1", "--port", str(port)),
        log=home / "api-server.log",
        environment=environment,
        answers=lambda: httpx.get(f"{url}/api/v2/monitor/health", timeout=5).is_success,
    ):
        yield url


RUN = "/api/v2/dags/asking/dagRuns/manual__1"
CLEAR = {"dry_run": False, "task_ids": ["rate"], "dag_run_id": "manual__1", "only_failed": False}
POOL = {"name": "mine", "slots": 1, "include_deferred": False}

POWERS = {
    "trigger a run": ("POST", "/api/v2/dags/asking/dagRuns", {"logical_date": None}),
    "clear a task": ("POST", "/api/v2/dags/asking/clearTaskInstances", CLEAR),
    "clear a run": ("POST", f"{RUN}/clear", {"dry_run": False}),
    "mark a run": ("PATCH", RUN, {"state": "failed"}),
    "mark a task": ("PATCH", f"{RUN}/taskInstances/rate", {"new_state": "success"}),
    "delete a run": ("DELETE", RUN, None),
    "pause": ("PATCH", "/api/v2/dags/asking", {"is_paused": True}),
    "pause all": ("PATCH", "/api/v2/dags?dag_id_pattern=~", {"is_paused": True}),
    "delete the DAG": ("DELETE", "/api/v2/dags/asking", None),
    "backfill": (
        "POST",
        "/api/v2/backfills",
        {"dag_id": "asking", "from_date": "2026-01-01T00:00:00Z", "to_date": "2026-01-02T00:00:00Z"},
    ),
    "announce an asset": ("POST", "/api/v2/assets/events", {"asset_id": 1}),
    "read connections": ("GET", "/api/v2/connections", None),
    "read variables": ("GET", "/api/v2/variables", None),
    "read a variable": ("GET", "/api/v2/variables/planted", None),
    "set a variable": ("POST", "/api/v2/variables", {"key": "a", "value": "b"}),
    "make a pool": ("POST", "/api/v2/pools", POOL),
    "change a pool": ("PATCH", "/api/v2/pools/default_pool", {**POOL, "name": "default_pool"}),
    "read the configuration": ("GET", "/api/v2/config", None),
    "read users": ("GET", "/auth/fab/v1/users", None),
    "read roles": ("GET", "/auth/fab/v1/roles", None),
    "make a user": ("POST", "/auth/fab/v1/users", {"username": "x", "password": "x"}),
}
# what Viewer may see and Rater may not
INSIGHTS = {
    "logs": ("GET", f"{RUN}/taskInstances/rate/logs/1", None),
    "XComs": ("GET", f"{RUN}/taskInstances/rate/xcomEntries", None),
    "code": ("GET", "/api/v2/dagSources/asking", None),
    "import errors": ("GET", "/api/v2/importErrors", None),
    "pools": ("GET", "/api/v2/pools", None),
    "jobs": ("GET", "/api/v2/jobs", None),
    "assets": ("GET", "/api/v2/assets", None),
}


def question(task: str) -> str:
    return f"{RUN}/taskInstances/{task}/-1/hitlDetails"


ANSWER = {"chosen_options": ["A"], "params_input": {}}


def test_a_rater_sees_open_questions_answers_them_and_can_do_nothing_else(server: str) -> None:
    rater = Person(server, "rater")
    open_ = rater.get("/api/v2/dags/~/dagRuns/~/hitlDetails?response_received=false")
    assert {entry["task_instance"]["task_id"] for entry in open_["hitl_details"]} == {"rate", "again"}
    assert rater.get(question("rate"))["options"] == ["A", "B"]
    # what the page of a question asks for
    for path in ("/api/v2/dags/asking/details", RUN, f"{RUN}/taskInstances/rate", "/ui/auth/menus", "/ui/config"):
        assert rater.status("GET", path) == 200, path
    assert "Required Actions" in rater.get("/ui/auth/menus")["authorized_menu_items"]

    refused = {name: rater.status(*asked) for name, asked in {**POWERS, **INSIGHTS}.items()}
    assert {name: status for name, status in refused.items() if status != 403} == {}

    assert rater.status("PATCH", question("rate"), ANSWER) == 200
    answered = rater.get(question("rate"))
    assert (answered["chosen_options"], answered["responded_by_user"]["name"]) == (["A"], "rater")
    assert rater.status("PATCH", question("rate"), ANSWER) == 409, "an answer is final"
    assert rater.get(RUN)["state"] == "running"
    assert rater.get("/api/v2/dags/asking")["is_paused"] is False


def test_a_viewer_sees_more_and_cannot_answer(server: str) -> None:
    viewer = Person(server, "viewer")
    assert viewer.get(question("again"))["response_received"] is False
    assert viewer.status("PATCH", question("again"), ANSWER) == 403
    assert {name: viewer.status(*asked) for name, asked in INSIGHTS.items() if name != "logs"} == {
        name: 200 for name in INSIGHTS if name != "logs"
    }
    refused = {name: viewer.status(*asked) for name, asked in POWERS.items()}
    assert {name: status for name, status in refused.items() if status != 403} == {}


def test_a_user_answers_and_triggers_but_reads_no_connection(server: str) -> None:
    user = Person(server, "user")
    assert user.status("PATCH", question("again"), ANSWER) == 200
    assert user.status(*POWERS["trigger a run"]) == 200
    for power in ("read connections", "read variables", "set a variable", "make a pool", "read users", "make a user"):
        assert user.status(*POWERS[power]) == 403, power


@pytest.mark.parametrize("name", ["nobody", "rater"])
def test_who_has_no_password_gets_nothing(server: str, name: str) -> None:
    login = {"username": name, "password": "wrong"}
    assert httpx.post(f"{server}/auth/token", json=login, timeout=60).status_code == 401
    assert httpx.get(f"{server}{question('rate')}", timeout=60).status_code == 401
    assert httpx.get(f"{server}/api/v2/dags/{quote('~')}/dagRuns/~/hitlDetails", timeout=60).status_code == 401
