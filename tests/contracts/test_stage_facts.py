"""A stage states its own facts: one that stands only in the graph is in every list of stages.

The imaginary stage is a sibling of DPO. What a real one has besides its facts (settings, a place in the recipe) is put
in place by tests/imaginary.py; no other module is told of it.
"""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from infra.run_state import Row, Snapshot, task_order
from infra.screen import summary_table
from operators.evaluation import evaluation_config
from operators.form import trigger_form
from operators.given import given_artifacts
from operators.people.approval import question
from operators.people.collect import find_model
from operators.plan import Plan, StagePlan, Verdict, make_plan
from operators.plan_page import as_table
from stages.artifacts.addresses import open_store
from stages.config.closing import PromoteConfig
from stages.config.forms import EvaluationParams
from stages.config.graph import GRAPH, Stage
from stages.config.preferences import DPOConfig
from stages.config.recipes import tiny
from stages.config.request import ArtifactRef, Manifest, RunInfo, StageResult
from stages.config.resolve import resolve
from stages.lineage.graph import ancestors
from stages.lineage.tags import lineage_tags
from stages.lineage.views import to_svg
from stages.reporting.page import render_page
from stages.reporting.story import read_story
from tests.comparisons import compared, with_comparisons
from tests.imaginary import imaginary
from tests.pipeline_records import EVALUATION, context_for, publish_run, refs_for, request_for, run_info
from tests.places import REPOSITORY

RUN = RunInfo(run_id="r", name="n")


@pytest.fixture
def ipo() -> Iterator[Stage]:
    """The imaginary stage, in the graph behind DPO."""
    with imaginary(StagePlan, Plan) as spec:
        yield spec.stage


def test_the_form_offers_it_and_the_recipes_say_how_much_it_trains(ipo: Stage) -> None:
    form = trigger_form()
    offered = form.get_param("last_stage").schema["enum"]
    assert offered[offered.index("dpo") + 1] == ipo
    assert "| ipo | 0.5 epochs, sigmoid loss" in form.get_param("recipe").schema["description_md"]


def test_a_run_selects_it_seeds_it_and_weighs_its_sources(ipo: Stage) -> None:
    config = resolve({"recipe": "tiny", "seed": 7, "preferences": ["a.jsonl#weight=0.3"]})
    assert ipo in config.selected
    settings = config.stage_config(ipo)
    assert isinstance(settings, DPOConfig)
    assert settings.seed == 7
    assert [entry.source for entry in settings.mixture] == ["a.jsonl"]
    assert ipo not in resolve({"recipe": "tiny", "alignment": "dpo"}).selected


def test_it_is_a_task_of_the_dag_between_its_inputs_and_the_evaluation(ipo: Stage) -> None:
    tasks = runpy.run_path(str(REPOSITORY / "dags" / "llm_pipeline.py"))["llm_pipeline"].task_dict
    task, gate = tasks[ipo], tasks["gate_ipo"]
    assert (task.upstream_task_ids, task.downstream_task_ids) == ({"gate_sft"}, {"gate_ipo"})
    assert gate.downstream_task_ids == {"evaluate"}
    assert task.pool == gate.pool == "gpu"


def test_the_plan_shows_what_it_trains(ipo: Stage, tmp_path: Path) -> None:
    config = resolve({"recipe": "tiny"})
    plan = make_plan(config, run=RUN, store=open_store((tmp_path / "store").as_uri()))
    shown = plan.of(ipo)
    assert shown.verdict is Verdict.RUN
    assert shown.estimate is not None
    assert shown.estimate.tokens == config.curate.max_preferences * 2 * 128 * 0.5
    assert shown.estimate.memory_bytes
    assert any(line.startswith("ipo ") for line in as_table(plan))


def test_the_screen_shows_its_place_and_its_headlines(ipo: Stage) -> None:
    order = task_order()
    assert order.index("dpo") < order.index("ipo") < order.index("gate_ipo") < order.index("evaluate")
    artifact = ArtifactRef(kind="ipo-model", uri="file:///nowhere", fingerprint="f", digest="d")
    result = StageResult(stage=ipo, hit=False, artifact=artifact, metrics={"dpo/accuracy": 0.75})
    snapshot = Snapshot("success", (Row("resolve", "success"), Row("ipo", "built", result=result)))
    console = Console(width=100, record=True, quiet=True)
    console.print(summary_table(snapshot))
    assert snapshot.rows[1].key_metric == "accuracy in training 75.0%"
    assert [row.name for row in snapshot.stages] == ["ipo"]


def test_the_report_has_its_curves_its_row_and_its_column(ipo: Stage, tmp_path: Path) -> None:
    _, made = published(tmp_path)
    story = read_story(refs_for(Stage.REPORT, made), run_info(), title="t", max_samples=3)
    page = render_page(story)
    assert 'aria-label="Imaginary PO Loss' in page
    assert "Imaginary PO win rate" in page
    assert "Imaginary PO trains 1 model and learns from preference pairs." in page
    assert ">Imaginary PO</th>" in page
    assert "ipo-model" in page


def published(tmp_path: Path) -> tuple[Any, dict[Stage, ArtifactRef]]:
    models = {**EVALUATION["models"], "ipo": {"eval/perplexity": 71.0, "eval/win_rate": 0.9, "eval/score_mean": 0.4}}
    return publish_run(tmp_path, evaluation={**EVALUATION, "models": models}, promotion={"chosen": "ipo"})


def test_lineage_draws_it_as_a_model_and_tags_it_as_a_parent(ipo: Stage, tmp_path: Path) -> None:
    store, made = published(tmp_path)
    svg = to_svg(ancestors([made[Stage.EVALUATE].uri]))
    assert re.search(r'<rect class="model"[^>]*/><text[^>]*>ipo-model</text>', svg)
    key = f"artifacts/evaluation/{made[Stage.EVALUATE].fingerprint}/manifest.json"
    tags = lineage_tags(Manifest.model_validate_json(store.read_bytes(key)), made[Stage.EVALUATE].uri)
    assert tags["lineage.parent.ipo"] == made[ipo].fingerprint


def test_people_may_start_from_it_and_compare_what_it_says(ipo: Stage, tmp_path: Path) -> None:
    _, made = published(tmp_path)
    config = resolve({"recipe": "tiny"}).model_copy(update={"base_model": made[ipo].uri})
    assert given_artifacts(config)["base_model"].kind == "ipo-model"
    model, tokens = find_model(made[ipo].uri)
    assert (model.kind, tokens.kind) == ("ipo-model", "tokens")


def test_the_approval_table_shows_it(ipo: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    models = {**EVALUATION["models"], "ipo": {"eval/perplexity": 71.0}}
    evaluation = with_comparisons({**EVALUATION, "models": models}, compared("ipo", "sft", level=0.01))
    _, made = publish_run(tmp_path, evaluation=evaluation)
    subject, body = question(run_info(), resolve({"recipe": "tiny"}), made[Stage.EVALUATE])
    assert "Imaginary PO" in subject
    assert "| Imaginary PO |" in body
    assert "| Imaginary PO | SFT | pairs, accuracy ↑ |" in body


def test_evaluation_measures_it_beside_the_model_that_it_was_made_from(ipo: Stage, tmp_path: Path) -> None:
    from stages.judge.subjects import model_folders

    store, made = published(tmp_path)
    request = request_for(Stage.EVALUATE, store, refs_for(Stage.EVALUATE, made))
    context = context_for(request, store, tiny().evaluate, tmp_path)
    assert list(model_folders(context)) == ["base", "sft", "ppo", "dpo", "ipo"]
    again = evaluation_config(EvaluationParams(model=made[ipo].uri, recipe="tiny"))
    assert {"ipo", "sft", "tokens"} <= again.given.keys()


def test_promotion_registers_it(ipo: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import stages.promote

    registered: list[str] = []

    class Enough(Exception):
        pass

    class Registry:
        def __init__(self, *_: Any) -> None: ...

        def register(self, role: str, *_: Any) -> None:
            registered.append(role)
            if role == "ipo":
                raise Enough

    store, made = published(tmp_path)
    monkeypatch.setattr(stages.promote, "Registry", Registry)
    request = request_for(Stage.PROMOTE, store, refs_for(Stage.PROMOTE, made))
    with pytest.raises(Enough):
        stages.promote.run(context_for(request, store, PromoteConfig(run_name="demo"), tmp_path))
    assert registered == ["base", "sft", "reward", "gold", "ppo", "dpo", "ipo"]


def test_afterwards_everything_is_as_it_was() -> None:
    result = {"stage": "ipo", "hit": True, "artifact": {"kind": "k", "uri": "u", "fingerprint": "f", "digest": "d"}}
    before = list(GRAPH)
    with imaginary(StagePlan, Plan):
        StageResult.model_validate(result)
    assert list(GRAPH) == before
    assert "ipo" not in task_order()
    with pytest.raises(ValidationError, match="stage"):
        StageResult.model_validate(result)
