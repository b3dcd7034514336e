"""What a person does in the browser: fill in the form, see what is wrong, watch, open links, decide, label a pair."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from stages.artifacts.manifests import read_file, read_manifest
from stages.config.graph import Stage
from tests.browser.pages import (
    choose,
    follow,
    login_airflow,
    open_form,
    open_graph,
    press_trigger,
    switch_on,
    task_page,
    type_json,
    unfold,
    unlock_ray,
)
from tests.live_stack import COLLECT, OVERRIDES, PIPELINE, LiveStack

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page  # pyright: ignore[reportMissingImports]

pytestmark = [
    pytest.mark.live,
    pytest.mark.browser,
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]

# Long enough for a look at Ray and MLflow while it runs.
LONG_SFT = {**OVERRIDES, "sft.num_epochs": 3.0}


def submit(dialog: Locator, live: LiveStack) -> str:
    """Press Trigger and return the new run's id."""
    before = {run["dag_run_id"] for run in live.runs(PIPELINE)}
    press_trigger(dialog)
    (new,) = live.wait(
        "the run", lambda: [run["dag_run_id"] for run in live.runs(PIPELINE) if run["dag_run_id"] not in before]
    )
    return new


def test_the_form_explains_every_field_in_sections(page: Page, live: LiveStack) -> None:
    dialog = open_form(page, live.record.airflow_url)
    recipe = unfold(dialog, "Run", "recipe")
    assert recipe.input_value() == "demo"
    dialog.get_by_role("cell", name="2.16 M parameters: 4 layers of 192").wait_for()  # what the recipe's defaults are
    assert {option.get_attribute("value") for option in dialog.locator("datalist option").all()} >= {"demo", "tiny"}
    assert unfold(dialog, "Data", "documents").evaluate("field => field.tagName") == "TEXTAREA"
    dialog.get_by_text("one source per line").first.wait_for()
    unfold(dialog, "Model and alignment", "alignment").get_by_text("Both, side by side").wait_for()
    assert unfold(dialog, "Course of the run", "dry_run").count() == 1
    unfold(dialog, "Changes to the recipe", "overrides")


def test_the_form_shows_what_is_wrong_and_does_not_let_go(page: Page, live: LiveStack) -> None:
    dialog = open_form(page, live.record.airflow_url)
    name = unfold(dialog, "Run", "run_name")
    name.fill("")
    dialog.get_by_text("This field is required").wait_for()
    trigger = dialog.get_by_role("button", name="Trigger", exact=True)
    assert trigger.is_disabled()
    name.fill("browser")
    dialog.get_by_text("This field is required").wait_for(state="hidden")
    assert trigger.is_enabled()
    type_json(page, unfold(dialog, "Changes to the recipe", "overrides"), '{"sft.num_epochs": ')
    dialog.get_by_text("SyntaxError").first.wait_for()
    assert trigger.is_disabled()


def test_a_wrong_field_ends_the_run_in_seconds_and_says_what_was_meant(page: Page, live: LiveStack) -> None:
    dialog = open_form(page, live.record.airflow_url)
    unfold(dialog, "Run", "recipe").fill("tinny")
    run_id = submit(dialog, live)
    assert live.wait_end(PIPELINE, run_id) == "failed"
    page.goto(task_page(live.record.airflow_url, PIPELINE, run_id, "resolve"))
    page.get_by_text("recipe='tinny' does not exist").first.wait_for()
    page.get_by_text("Did you mean 'tiny'?").first.wait_for()


@pytest.mark.usefixtures("first_run")
def test_the_plan_is_shown_before_anything_is_spent(page: Page, live: LiveStack) -> None:
    dialog = open_form(page, live.record.airflow_url)
    unfold(dialog, "Run", "recipe").fill("tiny")
    switch_on(unfold(dialog, "Course of the run", "dry_run"))
    choose(page, unfold(dialog, "Model and alignment", "alignment"), "DPO: directly from preference pairs")
    type_json(page, unfold(dialog, "Changes to the recipe", "overrides"), json.dumps(LONG_SFT))
    run_id = submit(dialog, live)
    assert live.wait_end(PIPELINE, run_id) == "success"
    assert live.states(PIPELINE, run_id)["curate"] == "skipped"
    page.goto(task_page(live.record.airflow_url, PIPELINE, run_id, "plan"))
    page.get_by_text("Plan of recipe tiny, and nothing else: this is a dry run").first.wait_for()
    page.get_by_text("num_epochs: 0.5 -> 3.0").first.wait_for()
    parent = live.xcom(PIPELINE, run_id, "resolve")["parent_run_id"]
    page.goto(f"{live.record.mlflow_url}/#/runs/{parent}")
    page.get_by_role("heading", name="Plan of recipe tiny").first.wait_for()


@pytest.mark.usefixtures("first_run")
def test_a_run_from_the_form_to_an_approved_champion(page: Page, live: LiveStack) -> None:
    dialog = open_form(page, live.record.airflow_url)
    unfold(dialog, "Run", "recipe").fill("tiny")
    unfold(dialog, "Run", "run_name").fill("browser")
    choose(page, unfold(dialog, "Model and alignment", "alignment"), "DPO: directly from preference pairs")
    choose(page, unfold(dialog, "Course of the run", "promotion"), "By approval: a person decides")
    type_json(page, unfold(dialog, "Changes to the recipe", "overrides"), json.dumps(LONG_SFT))
    run_id = submit(dialog, live)

    # While the stage runs its page leads to Ray and to MLflow.
    live.wait_state(PIPELINE, run_id, "sft", "deferred")
    page.goto(task_page(live.record.airflow_url, PIPELINE, run_id, "sft", "/details"))
    ray = follow(page, "Ray job")
    unlock_ray(ray, live.secrets.ray_token)
    ray.get_by_text("RUNNING", exact=True).first.wait_for()
    follow(page, "MLflow run").get_by_text("Running", exact=True).first.wait_for()
    assert live.states(PIPELINE, run_id)["sft"] == "deferred", "all that was seen while it ran"

    live.wait_state(PIPELINE, run_id, "approve", "awaiting_input")
    page.goto(task_page(live.record.airflow_url, PIPELINE, run_id, "approve", "/required_actions"))
    page.get_by_text("Answers side by side").wait_for()
    headings = [cell.inner_text() for cell in page.get_by_role("table").first.get_by_role("columnheader").all()]
    assert headings == ["", "Base", "SFT", "DPO"]
    page.locator("[id=element_comment]").fill("reads well")
    page.get_by_role("button", name="Approve").click()

    open_graph(page, live.record.airflow_url, run_id)
    assert live.wait_end(PIPELINE, run_id) == "success"
    finished = page.locator(".react-flow__node", has_text="close").get_by_text("success", exact=False)
    finished.wait_for()  # without loading the page again
    champion = live.aliased("browser-aligned", "champion")
    assert champion is not None
    assert (champion["approval.verdict"], champion["approval.comment"]) == ("approved", "reads well")
    assert live.rows(run_id)["pretrain"].state == "hit"


@pytest.mark.usefixtures("first_run")
def test_a_rejection_leaves_no_champion_and_a_report(page: Page, live: LiveStack) -> None:
    run_id = live.pipeline("refused", promotion="approval")
    live.wait_state(PIPELINE, run_id, "approve", "awaiting_input")
    page.goto(f"{live.record.airflow_url}/required_actions?response_received=false")
    page.get_by_role("link", name="refused: promote the DPO model to champion?").first.click()
    page.get_by_role("button", name="Reject").click()
    assert live.wait_end(PIPELINE, run_id) == "success"
    assert live.aliased("refused-aligned", "champion") is None
    candidate = live.aliased("refused-aligned", "candidate")
    assert candidate is not None
    assert candidate["approval.verdict"] == "rejected"
    assert live.artifact(run_id, Stage.REPORT).kind == "report"


@pytest.mark.usefixtures("first_run")
def test_a_pair_is_labelled_on_the_page_of_required_actions(page: Page, live: LiveStack) -> None:
    run_id = live.trigger(COLLECT, prompts=["Who goes there?"], max_response_length=8)
    live.wait_state(COLLECT, run_id, "rate", "awaiting_input", map_index=0)
    page.goto(f"{live.record.airflow_url}/required_actions?response_received=false")
    page.get_by_role("link", name="Which response is better: Who goes there?").first.click()
    page.get_by_text("Who goes there?").first.wait_for()
    page.get_by_role("heading", name="B", exact=True).wait_for()
    page.get_by_role("button", name="B", exact=True).click()
    assert live.wait_end(COLLECT, run_id) == "success"
    made = live.xcom(COLLECT, run_id, "publish")
    assert read_manifest(made["uri"]).ledger["questions"]["answered"] == 1
    (pair,) = [json.loads(line) for line in read_file(made["uri"], "preferences.jsonl").splitlines()]
    assert (pair["prompt"], pair["by"]) == ("Who goes there?", "admin")


def test_the_login_is_needed(page: Page, live: LiveStack) -> None:
    """The tests above would prove nothing about people if anybody could decide."""
    page.context.clear_cookies()
    page.evaluate("window.localStorage.clear()")
    page.goto(f"{live.record.airflow_url}/required_actions")
    page.locator("input[name=username]").wait_for()
    login_airflow(page, live.record.airflow_url, live.secrets.admin_password)
