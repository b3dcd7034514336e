"""What a person opens and presses in the user interfaces; browser tests and pictures use the same steps.

Each function that opens a page waits until what matters is on it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote

import httpx

from infra.run_state import DAG_ID

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page  # pyright: ignore[reportMissingImports]

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
        context = browser.new_context(viewport=SIZE)  # pyright: ignore[reportArgumentType]
        context.set_default_timeout(180_000)  # a busy machine takes a minute for a page of MLflow
        try:
            yield context.new_page()
        finally:
            browser.close()


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


def open_question(page: Page, address: str, told: str) -> None:
    """What a person is asked by a task; `told` is a text of the question."""
    page.goto(address)
    page.get_by_text(told).first.wait_for()
    page.wait_for_timeout(1500)  # the form is laid out below it


def mlflow_experiment_of(url: str, run_id: str) -> str:
    response = httpx.get(f"{url}/api/2.0/mlflow/runs/get", params={"run_id": run_id}, timeout=30)
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


def open_form(page: Page, url: str, dag_id: str = DAG_ID) -> Locator:
    """The trigger form of a DAG, its sections folded as they come."""
    page.goto(f"{url}/dags/{dag_id}")
    page.get_by_role("button", name="Trigger Dag").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("Advanced Options").wait_for()
    return dialog


def unfold(dialog: Locator, section: str, field: str) -> Locator:
    """A field of the form, with its section unfolded."""
    found = dialog.locator(f"[id=element_{field}], [name=element_{field}]").first
    if not found.is_visible():
        dialog.get_by_role("button", name=section, exact=True).click()
    found.wait_for()
    return found


def choose(page: Page, field: Locator, label: str) -> None:
    """Take one of the choices of a field, by what people read."""
    field.click()
    page.get_by_role("option", name=label, exact=True).click()


def type_json(page: Page, field: Locator, text: str) -> None:
    """Replace what is in the form's JSON editor, which closes brackets and quotes by itself."""
    field.click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(text)
    page.keyboard.press("Control+Shift+End")
    page.keyboard.press("Delete")


def switch_on(field: Locator) -> None:
    """Of a switch the form shows the label; the field itself is out of sight."""
    field.locator("xpath=ancestor::label").click()


def task_page(url: str, dag_id: str, run_id: str, task_id: str, tab: str = "") -> str:
    return f"{url}/dags/{dag_id}/runs/{quote(run_id)}/tasks/{task_id}{tab}"


def follow(page: Page, link: str) -> Page:
    """Press a link that opens a page of its own, and return that."""
    with page.context.expect_page() as opened:
        page.get_by_role("link", name=link).click()
    return opened.value


def press_trigger(dialog: Locator) -> None:
    dialog.get_by_role("button", name="Trigger", exact=True).click()


def unlock_ray(page: Page, token: str) -> None:
    """Ray's dashboard asks for the cluster's token once a browser."""
    field = page.get_by_placeholder("Enter your authentication token")
    field.fill(token)
    page.get_by_role("button", name="Submit").click()
    field.wait_for(state="hidden")
