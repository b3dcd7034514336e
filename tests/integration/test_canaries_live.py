"""The whole local stack after a run that went well and one that failed: no secret lies where it could be read.

Airflow's task logs, XComs and rendered templates, Ray's session and job logs, MLflow, the store and the configuration
files of the stack all lie in one folder, which is searched file by file.
"""

import json
from pathlib import Path

import httpx
import pytest

from infra.layout import Layout
from stages.config.request import run_folder
from tests.canaries import Search, airflow_answers, as_text
from tests.live_stack import PIPELINE, LiveStack

pytestmark = [pytest.mark.live, pytest.mark.timeout(1200)]


HOSTILE = "{{ 7 * 7 }}/$(touch athanor-ran)/`touch athanor-ran`/'; DROP TABLE dag_run; --"
"""What a form field may hold and nobody may obey: for Jinja, a shell, SQL, and a path that does not exist."""


@pytest.fixture(scope="module")
def failed_run(live: LiveStack) -> str:
    """Failures say more than successes: tracebacks, `failure.json`, the last words of a job, a notice."""
    run_id = live.pipeline("broken", documents=[f"/nowhere/{HOSTILE}"], last_stage="curate")
    assert live.wait_end(PIPELINE, run_id, seconds=300) == "failed"
    return run_id


def searched(live: LiveStack, needles: dict[str, str], runs: tuple[str, ...]) -> Search:
    layout, search = Layout(live.home), Search(needles)
    runtime = Path(live.record.runtime_dir)
    search.folder(layout.home, "stack", except_for=(layout.secrets, layout.airflow_passwords))
    if not runtime.is_relative_to(layout.home):
        search.folder(runtime, "runtime")
    for run_id in runs:
        search.text("airflow", as_text(airflow_answers(live.api.call, PIPELINE, run_id)))
    held = {"Authorization": f"Bearer {live.secrets.ray_token}"}
    search.text("jobs", httpx.get(f"{live.record.ray_url}/api/jobs/", headers=held, timeout=30).text)
    return search


def test_no_secret_is_anywhere_it_could_be_read(live: LiveStack, first_run: str, failed_run: str) -> None:
    needles = {**live.secrets.model_dump(), **live.canaries}
    assert len(needles) >= 9
    search = searched(live, needles, (first_run, failed_run))
    assert search.seen > 300
    assert search.found == []


def test_the_search_finds_what_is_there(live: LiveStack, first_run: str, failed_run: str) -> None:
    """These words are no secrets, and are in task logs, XComs, jobs, the store and MLflow."""
    needles = {"dag": PIPELINE, "job": "athanor-curate-", "folder": f"/nowhere/{HOSTILE}"}
    search = searched(live, needles, (first_run, failed_run))
    places = {(place.split("/")[0], name) for place, name in search.found}
    assert {("airflow", "dag"), ("jobs", "job"), ("airflow", "folder")} <= places
    assert {folder for folder, _ in places if folder.startswith("stack ")} >= {
        "stack airflow",
        "stack logs",
        "stack mlflow",
        "stack store",
    }


def test_what_a_form_holds_is_read_and_never_obeyed(live: LiveStack, failed_run: str) -> None:
    """The folder arrives at the job as it was typed, is not found, and is named in the failure."""
    folder = live.home / ".athanor/store/runs" / run_folder(PIPELINE, failed_run)
    failure = json.loads((folder / "curate/failure.json").read_text())
    assert f"'/nowhere/{HOSTILE}' does not exist" in failure["message"].replace("\\'", "'").replace('"', "'")
    assert not list(live.home.rglob("athanor-ran"))
    assert live.runs(PIPELINE)


def test_files_with_secrets_are_readable_by_their_owner_alone(live: LiveStack) -> None:
    layout = Layout(live.home)
    for path in (layout.secrets, layout.airflow_passwords, layout.record):
        assert path.stat().st_mode & 0o077 == 0, path
