"""Pictures of the running stack for docs/images: `make screenshots`, after a `make demo` that succeeded."""

from __future__ import annotations

import sys
from pathlib import Path

from infra.health import Health
from infra.layout import CHECKOUT, Layout, StackRecord, StackSecrets
from infra.run_state import DAG_ID, RunWatch
from infra.stack import Stack
from stages.config.graph import Stage
from stages.store import open_store
from tests.browser.pages import login_airflow, open_browser, open_graph, open_mlflow_run, open_task, open_trigger_form

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


def take_all(folder: Path) -> list[Path]:
    """Every picture of the documentation, from the newest successful run."""
    layout = Layout(CHECKOUT)
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
    return taken


if __name__ == "__main__":
    try:
        for picture in take_all(IMAGES):
            print(picture.relative_to(CHECKOUT))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
