"""Pictures of the running stack for docs/images: `make screenshots`, after a `make demo` that succeeded."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from infra.airflow_api import AirflowApi
from infra.health import Health
from infra.layout import CHECKOUT, Layout, StackRecord, StackSecrets
from infra.run_state import DAG_ID, RunWatch
from infra.stack import Stack
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.manifests import fetch
from stages.artifacts.store import Store
from stages.config.graph import Stage
from stages.config.request import StageResult, run_folder
from tests.browser.pages import (
    SIZE,
    login_airflow,
    open_browser,
    open_graph,
    open_mlflow_run,
    open_question,
    open_task,
    open_trigger_form,
    task_page,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page  # pyright: ignore[reportMissingImports]

TALL = {"width": 1200, "height": 1900}
IMAGES = CHECKOUT / "docs" / "images"


def last_success(record: StackRecord, secrets: StackSecrets) -> RunWatch:
    """The newest successful run that made its report itself: one of hits alone has no child runs to show."""
    api = Health(record, secrets).airflow
    query = {"state": "success", "order_by": "-start_date"}
    for run in api.call("GET", f"dags/{DAG_ID}/dagRuns", params=query)["dag_runs"]:
        watch = RunWatch(api, open_store(record.artifact_store), run["dag_run_id"])
        if any(row.name == Stage.REPORT and row.state == "built" for row in watch.snapshot().rows):
            return watch
    raise RuntimeError("no run has made a report yet; run `make demo` first")


@contextmanager
def asking(api: AirflowApi, dag_id: str, task_id: str, conf: dict[str, Any]) -> Iterator[str]:
    """A run that waits for a person; nobody answers, and it is marked failed, so that it leaves nothing behind."""
    run_id = api.trigger(dag_id, conf)
    deadline = time.monotonic() + 300
    try:
        while not any(task.task_id == task_id and task.state == "awaiting_input" for task in api.tasks(dag_id, run_id)):
            if time.monotonic() > deadline or api.run_state(dag_id, run_id) == "failed":
                raise RuntimeError(f"run {run_id} of {dag_id} did not come to {task_id}")
            time.sleep(1)
        yield run_id
    finally:
        api.call("PATCH", f"dags/{dag_id}/dagRuns/{quote(run_id)}", json={"state": "failed"})


def take_questions(page: Page, take: Callable[[str], None], url: str, api: AirflowApi, conf: dict[str, Any]) -> None:
    """What a person is asked: about the newest run's model, and about two of its responses."""
    page.set_viewport_size(TALL)  # pyright: ignore[reportArgumentType]
    with asking(api, DAG_ID, "approve", {**conf, "promotion": "approval"}) as run_id:
        open_question(page, task_page(url, DAG_ID, run_id, "approve", "/required_actions"), "Answers side by side")
        take("airflow-approval")
    page.set_viewport_size(SIZE)  # pyright: ignore[reportArgumentType]
    named = {"run_name": conf.get("run_name", "athanor"), "num_prompts": 1}
    with asking(api, "collect_preferences", "rate", named) as run_id:
        where = task_page(url, "collect_preferences", run_id, "rate", "/mapped/0/required_actions")
        open_question(page, where, "Choose the better response")
        take("airflow-rating")


def take_comparison(page: Page, picture: Path, api: AirflowApi, store: Store) -> bool:
    """The whole page of the newest comparison that succeeded; False if there is none."""
    query = {"state": "success", "order_by": "-start_date"}
    for run in api.call("GET", "dags/compare_alignment/dagRuns", params=query)["dag_runs"]:
        key = run_key(run_folder("compare_alignment", run["dag_run_id"]), Stage.COMPARE, "result.json")
        if store.exists(key):
            artifact = StageResult.model_validate_json(store.read_bytes(key)).artifact
            with tempfile.TemporaryDirectory() as scratch:
                page.goto((fetch(artifact, Path(scratch)) / "comparison.html").as_uri())
                page.screenshot(path=picture, full_page=True)
            return True
    return False


def take_all(folder: Path, *, checkout: Path) -> list[Path]:
    """Every picture of the documentation, from the newest successful run."""
    layout = Layout(checkout)
    record, secrets = Stack(layout, say=print).record(), StackSecrets.load_or_generate(layout)
    watch = last_success(record, secrets)
    results = {row.result.stage: row.result for row in watch.snapshot().rows if row.result}
    parent = watch.parameters()["parent_run_id"]
    folder.mkdir(parents=True, exist_ok=True)
    taken: list[Path] = []

    with open_browser() as page:

        def take(name: str) -> None:
            taken.append(folder / f"{name}.png")
            page.screenshot(path=taken[-1])

        login_airflow(page, record.airflow_url, secrets.admin_password)
        open_trigger_form(page, record.airflow_url)
        take("airflow-trigger-form")
        open_graph(page, record.airflow_url, watch.run_id)
        take("airflow-graph")
        open_task(page, record.airflow_url, watch.run_id, Stage.REPORT)
        take("airflow-report-task")
        open_task(page, record.airflow_url, watch.run_id, "plan")
        take("airflow-plan")
        conf = watch.api.call("GET", f"dags/{DAG_ID}/dagRuns/{quote(watch.run_id)}")["conf"]
        take_questions(page, take, record.airflow_url, watch.api, conf)
        open_mlflow_run(page, record.mlflow_url, parent)
        take("mlflow-parent-run")
        open_mlflow_run(page, record.mlflow_url, parent, tab="artifacts/report.html")
        take("mlflow-report")
        if (trained := results.get(Stage.SFT)) and trained.artifact.mlflow_run_id:
            open_mlflow_run(page, record.mlflow_url, trained.artifact.mlflow_run_id)
            take("mlflow-sft-run")
            open_mlflow_run(page, record.mlflow_url, trained.artifact.mlflow_run_id, tab="model-metrics")
            take("mlflow-sft-metrics")
        page.goto(f"{record.mlflow_url}/#/models")
        page.wait_for_timeout(4000)
        page.keyboard.press("Escape")  # it advertises itself on the first visit
        page.wait_for_timeout(1000)
        take("mlflow-models")
        compared = folder / "comparison.png"
        if take_comparison(page, compared, watch.api, open_store(record.artifact_store)):
            taken.append(compared)
    return taken


if __name__ == "__main__":
    try:
        # of another checkout's stack: `python -m tests.browser.screenshots <its folder>`
        stack_of = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKOUT
        for picture in take_all(IMAGES, checkout=stack_of):
            print(picture.relative_to(CHECKOUT))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
