"""What a person does in the browser: trigger by the form, watch, open links, approve, reject, label a pair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from tests.browser.screenshots import login_airflow, open_graph
from tests.live_stack import LiveStack

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page  # pyright: ignore[reportMissingImports]

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(600)]

DAG = "llm_pipeline"


def open_form(page: Page, stack: LiveStack) -> Locator:
    page.goto(f"{stack.record.airflow_url}/dags/{DAG}")
    page.get_by_role("button", name="Trigger Dag").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("Advanced Options").wait_for()
    return dialog


def unfold(dialog: Locator, section: str, field: str) -> Locator:
    """The field, with its section unfolded."""
    found = dialog.locator(f"[id=element_{field}]").first
    if not found.is_visible():
        dialog.get_by_role("button", name=section, exact=True).click()
    found.wait_for()
    return found


def choose(page: Page, field: Locator, value: str) -> None:
    field.click()
    page.get_by_role("option", name=value, exact=True).click()


def submit(dialog: Locator, stack: LiveStack) -> str:
    """Press Trigger and return the new run's id."""
    before = {run["dag_run_id"] for run in runs(stack)}
    dialog.get_by_role("button", name="Trigger", exact=True).click()
    (new,) = stack.wait("the run", lambda: [r["dag_run_id"] for r in runs(stack) if r["dag_run_id"] not in before])
    return new


def runs(stack: LiveStack) -> list[dict[str, Any]]:
    return stack.api.call("GET", f"dags/{DAG}/dagRuns")["dag_runs"]


def task_page(stack: LiveStack, run_id: str, task_id: str, tab: str = "") -> str:
    return f"{stack.record.airflow_url}/dags/{DAG}/runs/{quote(run_id)}/tasks/{task_id}{tab}"


def test_a_wrong_field_ends_the_run_in_seconds_and_says_what_was_meant(page: Page, people_stack: LiveStack) -> None:
    dialog = open_form(page, people_stack)
    unfold(dialog, "Run", "recipe").fill("tinny")
    run_id = submit(dialog, people_stack)
    assert people_stack.wait_end(DAG, run_id) == "failed"
    page.goto(task_page(people_stack, run_id, "resolve"))
    page.get_by_text("recipe='tinny' does not exist").first.wait_for()
    page.get_by_text("Did you mean 'tiny'?").first.wait_for()


def test_a_run_from_the_form_to_an_approved_champion(page: Page, people_stack: LiveStack) -> None:
    stack = people_stack
    dialog = open_form(page, stack)
    unfold(dialog, "Run", "recipe").fill("tiny")
    unfold(dialog, "Run", "run_name").fill("browser")
    choose(page, unfold(dialog, "Model and alignment", "alignment"), "dpo")
    choose(page, unfold(dialog, "Course of the run", "promotion"), "approval")
    dialog.locator("input[name=element_seed]").fill("7")  # a run of its own: no stage has been built before
    run_id = submit(dialog, stack)

    stack.wait_state(DAG, run_id, "sft", "deferred")
    page.goto(task_page(stack, run_id, "sft"))
    addresses = {
        name: page.get_by_role("link", name=name).first.get_attribute("href") for name in ("Ray job", "MLflow run")
    }
    states = {task.task_id: task.state for task in stack.api.tasks(DAG, run_id)}
    assert states["sft"] == "deferred", "the links are there before the stage has ended"
    page.goto(addresses["MLflow run"] or "")
    page.get_by_text("Overview").first.wait_for()
    page.set_extra_http_headers({"Authorization": f"Bearer {stack.secrets.ray_token}"})
    page.goto(addresses["Ray job"] or "")
    page.get_by_text("athanor").first.wait_for()
    page.set_extra_http_headers({})

    stack.wait_state(DAG, run_id, "approve", "awaiting_input")
    page.goto(task_page(stack, run_id, "approve", "/required_actions"))
    page.get_by_text("Answers side by side").wait_for()
    assert page.get_by_role("cell", name="DPO", exact=True).or_(page.get_by_role("columnheader", name="DPO")).count()
    page.locator("[id=element_comment]").first.fill("reads well")
    page.get_by_test_id("hitl-option-Approve").click()

    open_graph(page, stack.record.airflow_url, run_id)
    assert stack.wait_end(DAG, run_id) == "success"
    page.get_by_text("Success").first.wait_for()  # without loading the page again
    champion = stack.aliased("browser-aligned", "champion")
    assert champion is not None
    assert (champion["approval.verdict"], champion["approval.comment"]) == ("approved", "reads well")


def test_a_rejection_leaves_no_champion_and_a_report(page: Page, people_stack: LiveStack) -> None:
    stack = people_stack
    run_id = stack.trigger(DAG, recipe="tiny", alignment="dpo", promotion="approval", run_name="refused")
    stack.wait_state(DAG, run_id, "approve", "awaiting_input")
    page.goto(task_page(stack, run_id, "approve", "/required_actions"))
    page.get_by_test_id("hitl-option-Reject").click()
    assert stack.wait_end(DAG, run_id) == "success"
    assert stack.aliased("refused-aligned", "champion") is None
    candidate = stack.aliased("refused-aligned", "candidate")
    assert candidate is not None
    assert candidate["approval.verdict"] == "rejected"


def test_a_pair_is_labelled_on_the_page_of_required_actions(page: Page, people_stack: LiveStack) -> None:
    stack, dag = people_stack, "collect_preferences"
    if stack.aliased("refused-aligned", "candidate") is None:
        made = stack.trigger(DAG, recipe="tiny", alignment="dpo", promotion="never", run_name="refused")
        assert stack.wait_end(DAG, made) == "success"
    run_id = stack.trigger(dag, run_name="refused", num_prompts=1)
    stack.wait_state(dag, run_id, "rate", "awaiting_input", map_index=0)
    page.goto(f"{stack.record.airflow_url}/required_actions?response_received=false")
    page.get_by_text("Which response is better: What is 0 + 0?").first.wait_for()
    page.goto(f"{stack.record.airflow_url}/dags/{dag}/runs/{quote(run_id)}/tasks/rate/mapped/0/required_actions")
    page.get_by_text("It is 0.").wait_for()
    page.get_by_test_id("hitl-option-B").click()
    assert stack.wait_end(dag, run_id) == "success"
    assert stack.xcom(dag, run_id, "publish")["kind"] == "preferences"


def test_the_login_is_needed(people_stack: LiveStack, page: Page) -> None:
    """The tests above would prove nothing about people if anybody could decide."""
    page.context.clear_cookies()
    page.evaluate("window.localStorage.clear()")
    page.goto(f"{people_stack.record.airflow_url}/required_actions")
    page.locator("input[name=username]").wait_for()
    login_airflow(page, people_stack.record.airflow_url, people_stack.secrets.admin_password)
