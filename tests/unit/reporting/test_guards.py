"""What the page says about guards: which warned or stopped a training, when and why."""

from types import SimpleNamespace
from typing import Any

from stages.config.graph import Stage
from stages.reporting.guard_views import figures, guards_table
from stages.reporting.page import render_page
from stages.reporting.story import Story
from tests.pipeline_records import run_info
from tests.unit.config.test_invariants import manifest

EVENT = {"guard": "kl", "level": "warn", "step": 8, "value": 12.5, "limit": 10.0, "times": 2, "last_step": 16}
STOP = {**EVENT, "level": "stop", "step": 16, "value": 21.0, "limit": 20.0, "times": 1}


def story_of(ledger: dict[str, Any], history: Any = ()) -> Story:
    manifests: Any = {"ppo": SimpleNamespace(ledger=ledger)}
    return Story("t", run_info(), manifests, {}, histories={"ppo": list(history)})


def test_a_row_says_which_guard_did_what_when_and_why() -> None:
    events = [{**EVENT, "why": "kl: above warn"}, {**STOP, "why": "kl: above stop"}]
    ledger = {"guards": {"stopped": "kl: above stop", "events": events}, "steps": 17, "model_step": 12}
    table = guards_table(story_of(ledger))
    assert table is not None
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["PPO: kl", "warned", "8", "2", "12.5", "10", "kl: above warn"],
        ["PPO: kl", "stopped the training", "16", "1", "21", "20", "kl: above stop"],
    ]
    assert table.note == "PPO ended after step 17; its model is that of step 12."


def test_guards_that_said_nothing_are_told_and_a_run_without_guards_has_no_table() -> None:
    table = guards_table(story_of({"guards": {"stopped": "", "events": []}, "steps": 20}))
    assert table is not None
    assert [cell.text for cell in table.rows[0]][:2] == ["PPO: all", "neither warned nor stopped"]
    assert not table.note
    assert guards_table(story_of({"steps": 20})) is None


def test_what_guards_measured_is_drawn_over_steps() -> None:
    history = [
        {"step": step, "ppo/guard/kl": kl, "ppo/guard/kl_level": 0.0, "ppo/guard/good_step": 0.0}
        for step, kl in ((1, 0.5), (4, 2.0), (8, 9.0))
    ]
    (figure,) = figures(story_of({}, history))
    assert figure.title == "PPO guard kl"
    assert figure.data is not None
    assert figure.data.rows == (("1", "0.5"), ("4", "2"), ("8", "9"))


def test_the_page_has_a_section_about_them_and_interprets_nothing_in_it() -> None:
    events = [{**STOP, "why": "kl: <b>above</b>"}]
    ledger = {"guards": {"stopped": "kl", "events": events}, "steps": 17, "model_step": 12}
    made = {"ppo": manifest(Stage.PPO, ledger=ledger)}
    page = render_page(Story("t", run_info(), made, {"ppo": "file:///s"}))
    assert '<section id="guards">' in page
    assert "kl: &lt;b&gt;above&lt;/b&gt;" in page
    assert 'id="guards"' not in render_page(Story("t", run_info(), {}, {}))
