"""Hostile texts in the pages of Airflow and MLflow themselves, on the whole stack.

A run finds artifacts that say nothing but hostile texts; what it shows of them, its real tasks put there. A page of
another's may say things of its own on its console: what the same pages say of a run without hostile texts does not
count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from stages.artifacts.addresses import open_store
from stages.config.collect import RespondConfig
from stages.config.graph import Stage
from stages.config.resolve import resolve
from stages.config.text import printable
from tests.browser.hostile import HTML, OUTSIDE, RUN, Watch, watch
from tests.browser.hostile_records import OPENINGS, TOLD, plant_responses, plant_run
from tests.browser.pages import open_mlflow_run, task_page
from tests.live_stack import COLLECT, PIPELINE, TINY, LiveStack

if TYPE_CHECKING:
    from playwright.sync_api import Frame, Page  # pyright: ignore[reportMissingImports]

pytestmark = [
    pytest.mark.live,
    pytest.mark.browser,
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]

EXPERIMENT = f"{HTML['broken image']} ![x](http://{OUTSIDE}/leak) {{{{ 7*7 }}}}"
COMMENT = "\n".join(TOLD[:40])
MODEL = "hostile-aligned"


@dataclass(frozen=True)
class Planted:
    """Runs of the real DAGs that find hostile artifacts."""

    pipeline: str
    collection: str
    documents: str


@pytest.fixture(scope="module")
def planted(live: LiveStack, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Both run at the same time, up to where they ask a person."""
    folder = tmp_path_factory.mktemp("hostile")
    documents = folder / HTML["broken image"]
    documents.mkdir()
    (documents / f"{HTML['SVG that loads'].replace('/', '')}.txt").write_text("a document")
    source = [str(documents)]
    params = {**TINY, "run_name": "hostile", "promotion": "approval", "overrides": {"experiment": EXPERIMENT}}
    params |= {"documents": source, "instructions": source, "preferences": source}
    store = open_store(live.record.artifact_store)
    made = plant_run(store, resolve(params), folder / "artifacts")
    asked = RespondConfig(prompts=OPENINGS, max_response_length=8)
    inputs = {"model": made[Stage.DPO], "tokens": made[Stage.TOKENIZE]}
    plant_responses(store, asked, inputs, folder / "responses")
    collection = live.trigger(COLLECT, model=made[Stage.DPO].uri, prompts=list(OPENINGS), max_response_length=8)
    return Planted(live.trigger(PIPELINE, **params), collection, str(documents))


@pytest.fixture
def seen(page: Page) -> Watch:
    return watch(page)


def squeezed(text: str) -> str:
    """Text without what pages lay out in their own way: white space, and the sign for the end of a line."""
    return re.sub(r"[\s\u23ce]+", "", printable(text))


def assert_shown(place: Page | Frame, texts: Iterable[str]) -> None:
    """All of it can be read there, as it was written; in a table the ends of lines are signs, whatever they were."""
    shown = squeezed(place.locator("body").inner_text())
    spellings = {text: (squeezed(text), squeezed(" ".join(text.splitlines()))) for text in texts}
    assert [text for text, spelled in spellings.items() if not any(one in shown for one in spelled)] == []


def assert_quiet(seen: Watch, *, links_of_airflow: bool = False) -> None:
    """Nothing of what a text may want has happened, and the watch would have noticed it on this very page.

    Airflow's own view of a log makes a link of every address, which leads nowhere until somebody presses it.
    """
    seen.page.wait_for_timeout(600)
    assert [fault for fault in seen.faults() if not (links_of_airflow and fault.startswith("A to http"))] == []
    assert noticed(seen, seen.page.main_frame) == {"ran", "outside", "element"}


def noticed(seen: Watch, frame: Frame) -> set[str]:
    """What the watch says of a script, an image of a foreign host and an element that are put into a page here."""
    frame.evaluate(
        """([run, host]) => {
            const added = document.body.appendChild(document.createElement('div'))
            added.setAttribute('data-planted', '')
            added.appendChild(document.createElement('script')).textContent = run
            added.appendChild(document.createElement('img')).src = `http://${host}/noticed`
        }""",
        [RUN, OUTSIDE],
    )
    seen.page.wait_for_timeout(600)
    found = {name for name in ("ran", "outside", "violations") if getattr(seen, name)}
    found |= {"element" for fault in seen.faults() if fault.startswith("element <div data-planted")}
    for kept in (seen.ran, seen.outside, seen.violations):
        kept.clear()
    frame.evaluate("document.querySelectorAll('[data-planted]').forEach(added => added.remove())")
    return found


def test_raters_read_hostile_prompts_and_responses(seen: Watch, live: LiveStack, planted: Planted) -> None:
    page, url, run_id = seen.page, live.record.airflow_url, planted.collection
    for place in range(len(OPENINGS)):
        live.wait_state(COLLECT, run_id, "rate", "awaiting_input", map_index=place)
    page.goto(f"{url}/required_actions?response_received=false")
    asked = [f"Which response is better: {opening[:60]}" for opening in OPENINGS]
    page.get_by_role("link", name=asked[0]).first.wait_for()
    assert_shown(page, asked)
    assert_quiet(seen)
    for place in range(len(OPENINGS)):
        page.goto(f"{task_page(url, COLLECT, run_id, 'rate')}/mapped/{place}/required_actions")
        page.get_by_role("heading", name="B", exact=True).wait_for()
        assert_shown(page, [OPENINGS[place], *TOLD[place::4]])
        assert_quiet(seen)
        page.get_by_role("button", name="B", exact=True).click()
        live.wait_state(COLLECT, run_id, "rate", "success", map_index=place)
    assert live.wait_end(COLLECT, run_id) == "success"
    page.goto(task_page(url, COLLECT, run_id, "questions", "/xcom"))
    page.get_by_text("return_value").first.wait_for()
    assert_quiet(seen)


def test_who_approves_reads_hostile_names_and_answers(seen: Watch, live: LiveStack, planted: Planted) -> None:
    page, url, run_id = seen.page, live.record.airflow_url, planted.pipeline
    live.wait_state(PIPELINE, run_id, "approve", "awaiting_input")
    page.goto(task_page(url, PIPELINE, run_id, "plan"))
    page.get_by_text("Plan of recipe tiny").first.wait_for()
    assert_quiet(seen, links_of_airflow=True)
    page.goto(task_page(url, PIPELINE, run_id, "approve", "/required_actions"))
    page.get_by_text("Answers side by side").wait_for()
    assert_shown(page, TOLD)
    assert_quiet(seen)
    page.locator("[id=element_comment]").fill(COMMENT)
    page.get_by_role("button", name="Approve").click()
    assert live.wait_end(PIPELINE, run_id) == "success"
    page.goto(task_page(url, PIPELINE, run_id, "approve", "/xcom"))
    page.get_by_text("approved").first.wait_for()
    assert_quiet(seen)


@pytest.fixture
def reported(live: LiveStack, planted: Planted) -> str:
    """MLflow's run of the pipeline, once the report is there."""
    if live.api.run_state(PIPELINE, planted.pipeline) not in ("success", "failed"):
        live.wait_state(PIPELINE, planted.pipeline, "approve", "awaiting_input")
        live.answer(PIPELINE, planted.pipeline, "approve", "Approve", comment=COMMENT)
    assert live.wait_end(PIPELINE, planted.pipeline) == "success"
    return live.xcom(PIPELINE, planted.pipeline, "resolve")["parent_run_id"]


def test_mlflow_shows_a_hostile_report_and_obeys_none_of_it(seen: Watch, live: LiveStack, reported: str) -> None:
    open_mlflow_run(seen.page, live.record.mlflow_url, reported, tab="artifacts/report.html")
    report = frame_with(seen, ".sample h3")
    assert_shown(report, TOLD)
    assert_quiet(seen)
    # Chromium announces a request before the policy stops it.
    assert noticed(seen, report) == {"violations", "outside", "element"}, (
        "its own policy stops what would run, and tells"
    )


def frame_with(seen: Watch, selector: str) -> Frame:
    """The frame in which a page shows an artifact."""
    for _ in range(120):
        for frame in seen.page.frames[1:]:
            if frame.locator(selector).count():
                return frame
        seen.page.wait_for_timeout(500)
    raise AssertionError(f"no frame has {selector}: {[frame.url for frame in seen.page.frames]}")


@pytest.mark.parametrize("name", ["lineage/run.svg", "lineage/run.md", "lineage/run.json", "plan.md"])
def test_mlflow_shows_hostile_lineage_and_a_hostile_plan_and_obeys_neither(
    seen: Watch, live: LiveStack, reported: str, name: str
) -> None:
    open_mlflow_run(seen.page, live.record.mlflow_url, reported, tab=f"artifacts/{name}")
    seen.page.get_by_text(name.rpartition("/")[2]).first.wait_for()
    assert_quiet(seen)


def test_mlflow_shows_hostile_names_and_comments_and_obeys_none(seen: Watch, live: LiveStack, reported: str) -> None:
    page, url = seen.page, live.record.mlflow_url
    open_mlflow_run(page, url, reported)
    assert_quiet(seen)
    for address, told in (("experiments", EXPERIMENT), (f"models/{MODEL}/versions/1", "approval.comment")):
        page.goto(f"{url}/#/{address}")
        page.get_by_text(told).first.wait_for()
        assert_quiet(seen)
