"""Pictures of the running stack for docs/images: `make screenshots`, after a `make demo` that succeeded.

The functions open one page each and wait until what matters is on it, so that browser tests can use them too."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import requests

from infra.health import Health
from infra.layout import CHECKOUT, Layout, StackRecord, StackSecrets
from infra.run_state import DAG_ID, RunWatch
from infra.stack import Stack
from stages.config.graph import Stage
from stages.store import open_store

if TYPE_CHECKING:
    from playwright.sync_api import Page  # pyright: ignore[reportMissingImports]

IMAGES = CHECKOUT / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZE = {"width": 1440, "height": 960}


class BrowserMissing(RuntimeError):
    """No browser, or nothing to drive it with; the message says what to install."""


@contextmanager
def open_browser() -> Iterator[Page]:
    """A page in a headless browser that is already on this machine; none is downloaded."""
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        raise BrowserMissing(f"none of {', '.join(BROWSERS)} is on PATH; install chromium")
    try:
        from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise BrowserMissing("Playwright is missing; install the extra `browser` (`make screenshots` does)") from None
    # as root Chromium refuses to run inside its sandbox
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        page = browser.new_context(viewport=SIZE).new_page()  # pyright: ignore[reportArgumentType]
        page.set_default_timeout(60_000)
        try:
            yield page
        finally:
            browser.close()


# --------------------------------------------------------------- Airflow


def login_airflow(page: Page, url: str, password: str) -> None:
    page.goto(url)
    page.fill("input[name=username]", "admin")
    page.fill("input[name=password]", password)
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Dags").first.wait_for()


def open_trigger_form(page: Page, url: str, *, section: str = "Model and alignment") -> None:
    """The trigger form of the pipeline with one of its sections unfolded."""
    page.goto(f"{url}/dags/{DAG_ID}")
    page.get_by_role("button", name="Trigger Dag").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(section).click()
    dialog.get_by_text("Advanced Options").wait_for()
    page.wait_for_timeout(1000)  # the section unfolds


def open_graph(page: Page, url: str, run_id: str) -> None:
    """The graph of one run."""
    page.goto(f"{url}/dags/{DAG_ID}/runs/{quote(run_id)}")
    page.get_by_role("button", name="Show Graph").click()
    page.get_by_role("button", name="Collapse Details Panel").click()
    page.locator(".react-flow__node").first.wait_for()
    page.wait_for_timeout(2000)  # it is laid out
    page.get_by_role("button", name="Fit View").click()
    page.wait_for_timeout(1000)


def open_task(page: Page, url: str, run_id: str, task_id: str) -> None:
    """One task of a run: its buttons to Ray, MLflow and the report, and its log."""
    page.goto(f"{url}/dags/{DAG_ID}/runs/{quote(run_id)}/tasks/{task_id}")
    page.get_by_text("INFO").first.wait_for()
    page.wait_for_timeout(1000)


# ---------------------------------------------------------------- MLflow


def mlflow_experiment_of(url: str, run_id: str) -> str:
    response = requests.get(f"{url}/api/2.0/mlflow/runs/get", params={"run_id": run_id}, timeout=30)
    response.raise_for_status()
    return response.json()["run"]["info"]["experiment_id"]


def open_mlflow_run(page: Page, url: str, run_id: str, *, tab: str = "") -> None:
    """A run's page; `tab` is `model-metrics` or `artifacts/report.html`, for instance."""
    experiment = mlflow_experiment_of(url, run_id)
    page.goto(f"{url}/#/experiments/{experiment}/runs/{run_id}{f'/{tab}' if tab else ''}")
    page.get_by_text("Overview").first.wait_for()
    page.wait_for_timeout(3000)  # panels load one after another
    assistant = page.get_by_role("button", name="Close", exact=False)
    if page.get_by_text("MLflow Assistant").is_visible() and assistant.count():
        assistant.first.click()
        page.wait_for_timeout(500)


# -------------------------------------------------------------- pictures


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
