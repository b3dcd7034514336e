"""What a person reads of made data, what becomes of the answer, and that nothing is curated without it."""

import json
import random
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk.exceptions import AirflowSkipException, TaskAwaitingInput

from operators.failures import MadeDataRejected, StageConfigFailed, StageRetryPolicy
from operators.links import ReportLink
from operators.operator import StageOperator
from operators.people.review import MadeDataReview, question
from operators.prepare import pipeline_key
from stages.artifacts.made_samples import draw_samples
from stages.artifacts.store import Store
from stages.config.errors import ConfigError, DataError
from stages.config.graph import Stage
from stages.config.request import ArtifactRef
from stages.config.resolve import resolve
from tests.made_records import publish_made
from tests.pipeline_records import run_info
from tests.registry import RegisteredModels, serving
from tests.task_state import Memory

GIVEN = {"recipe": "tiny", "base_model": "/models/x", "instructions": ["/i.jsonl"], "preferences": ["/p.jsonl"]}
MADE = {
    **GIVEN,
    "review_made_data": True,
    "ai_feedback": "both",
    "constitution_prompts": ["/prompts.jsonl"],
    "synthesis": "distillation",
    "synthesis_sources": ["/asked.jsonl"],
}
PAGE = "http://mlflow/#/experiments/1/runs/p/artifacts/constitution.html"


class TaskInstance(SimpleNamespace):
    """What earlier tasks of the run have returned."""

    def xcom_pull(self, task_ids: str, key: str = "return_value") -> Any:
        return self.xcoms.get((task_ids, key) if key != "return_value" else task_ids)


class World:
    """A run whose models have made data, between the gates and the review."""

    def __init__(self, home: Path, **params: Any) -> None:
        self.store, self.made = publish_made(home)
        self.config = resolve({**MADE, **params})
        self.store.write_bytes(pipeline_key("manual-1"), self.config.model_dump_json().encode())
        xcoms: dict[Any, Any] = {stage.value: ref.model_dump(mode="json") for stage, ref in self.made.items()}
        xcoms |= {"resolve": run_info().model_dump(mode="json"), ("constitution", ReportLink().xcom_key): PAGE}
        known = {"dag_id": "llm_pipeline", "run_id": "manual__1", "task_id": "curate", "map_index": -1}
        self.ti = TaskInstance(xcoms=xcoms, id="ti", try_number=1, max_tries=10, **known)
        self.context = {"ti": self.ti, "task_instance": self.ti, "task_state_store": Memory()}

    @property
    def task(self) -> MadeDataReview:
        return MadeDataReview(store_uri=self.store.root_uri)

    def answer(self, option: str, comment: str = "", *, timed_out: bool = False) -> dict[str, Any]:
        event = {
            "chosen_options": [option],
            "params_input": {"comment": comment},
            "responded_at": datetime(2026, 11, 30, 9, 30, tzinfo=UTC),
            "responded_by_user": None if timed_out else {"id": "7", "name": "ada"},
            "timedout": timed_out,
        }
        return self.task.execute_complete(self.context, event)

    def record(self, name: str = "review.json") -> dict[str, Any]:
        return json.loads(self.store.read_bytes(f"runs/manual-1/review/{name}"))

    def curation(self) -> Any:
        """What the task `curate` would ask its job to do."""
        task = StageOperator(stage=Stage.CURATE, store_uri=self.store.root_uri)
        return task._request(self.context, run=run_info(), store=self.store)


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def asked(world: World, monkeypatch: pytest.MonkeyPatch) -> MadeDataReview:
    """The task once it has put its question: Airflow's own operator parks it there."""

    def park(operator: HITLOperator, context: Any) -> None:
        raise TaskAwaitingInput(method_name="execute_complete", timeout=operator.response_timeout)

    monkeypatch.setattr(HITLOperator, "execute", park)
    task = world.task
    with pytest.raises(TaskAwaitingInput):
        task.execute(world.context)
    return task


def test_a_person_reads_counts_cost_and_examples_of_every_stage_that_made_data(asked: MadeDataReview) -> None:
    body = asked.body or ""
    assert asked.subject == "demo: use 2 conversations for SFT, 3 preference pairs, 12 conversations for SFT?"
    assert "| critiques and revisions | 4 | 2 | unchanged 2 |" in body
    assert "| rows | 14 | 12 | refusal 2 |" in body
    assert "| generator\\: m | 28 | 1,400 | 700 | 3.50 |" in body
    assert body.index("Prompt**\n\n```text\nHow do I pick") < body.index("It leaves the victim out.")
    assert "**Critique by no\\-harm \\(harmless\\)**" in body
    assert "**Second response, worse than the first by be\\-kind \\(helpful\\)**" in body
    assert "### 3 of 3 accepted examples" in body
    assert "### 8 of 12 accepted examples" in body
    assert body.count("**Instruction**") == 8


def test_what_was_dropped_is_no_example(asked: MadeDataReview) -> None:
    body = asked.body or ""
    assert "DROPPED" not in body
    assert "I will not say." not in body


def test_the_question_links_to_the_page_of_the_stage_or_says_where_it_lies(asked: MadeDataReview, world: World) -> None:
    body = asked.body or ""
    assert f"[The page of constitution]({PAGE}) shows more of it" in body
    assert f"`{world.made[Stage.SYNTHESIZE].uri}/synthesis.html`" in body


def test_what_models_wrote_is_shown_and_not_obeyed(asked: MadeDataReview) -> None:
    """Texts stand in fences that they cannot close, and what is too long is cut."""
    body = asked.body or ""
    assert "````text\n```\n# Not a heading\n````" in body
    assert "… 3000 more characters" in body


def test_the_time_to_answer_is_a_setting(tmp_path: Path) -> None:
    world = World(tmp_path, overrides={"review.timeout_hours": 36, "review.num_samples": 1})
    _, body = question(run_info(), world.config, world.made, {})
    assert "No answer within 36 hours** counts as a rejection" in body
    assert "### 1 of 12 accepted examples" in body


def test_the_task_waits_as_long_as_the_run_says(asked: MadeDataReview) -> None:
    assert asked.response_timeout is not None
    assert asked.response_timeout.total_seconds() == 168 * 3600


def test_approved_data_is_curated_and_the_answer_is_kept(world: World) -> None:
    approved = world.answer("Approve", " reads well ")
    assert approved == world.record()
    assert approved["answer"] == {
        "verdict": "approved",
        "by": "ada",
        "at": "2026-11-30T09:30:00+00:00",
        "comment": "reads well",
    }
    assert {stage: ref["digest"] for stage, ref in approved["artifacts"].items()} == {
        stage.value: ref.digest for stage, ref in world.made.items()
    }
    world.ti.xcoms["review"] = approved
    assert set(world.curation().inputs) == {"constitution", "synthesize"}


def test_a_review_changes_nothing_of_what_is_curated(world: World, tmp_path: Path) -> None:
    world.ti.xcoms["review"] = world.answer("Approve")
    ours = world.curation()
    theirs = World(tmp_path, review_made_data=False).curation()  # the same data in the same store
    assert (ours.config, ours.inputs) == (theirs.config, theirs.inputs)


def test_rejected_data_ends_the_run_for_good_with_the_persons_reason(world: World) -> None:
    with pytest.raises(MadeDataRejected) as failed:
        world.answer("Reject", "half of the answers are wrong")
    assert failed.value.message == (
        "The data that constitution and synthesize made was rejected by ada: half of the answers are wrong. "
        "Nothing was curated or trained."
    )
    assert StageRetryPolicy().evaluate(failed.value, 1, 10).action.value == "fail"
    assert world.record()["answer"]["comment"] == "half of the answers are wrong"


def test_no_answer_in_time_is_a_rejection_that_says_so(world: World) -> None:
    with pytest.raises(MadeDataRejected, match="No person answered within 168 hours"):
        world.answer("Reject", timed_out=True)
    assert world.record()["answer"]["verdict"] == "timed_out"


def test_a_second_answer_puts_the_first_aside_and_the_same_one_does_not(world: World) -> None:
    for _ in range(2):  # a retry takes the same answer once more
        with pytest.raises(MadeDataRejected):
            world.answer("Reject", "no")
    assert not world.store.exists("runs/manual-1/review/review-1.json")
    world.answer("Approve", "on second thoughts")
    assert world.record("review-1.json")["answer"]["verdict"] == "rejected"
    assert world.record()["answer"]["verdict"] == "approved"


def test_nothing_is_curated_that_no_person_has_approved(world: World, tmp_path: Path) -> None:
    """A person may mark the task as success in Airflow, or clear a stage before it alone."""
    with pytest.raises(ConfigError, match="task 'review' left no approval"):
        world.curation()
    approved = world.answer("Approve")
    world.ti.xcoms["review"] = approved | {"artifacts": {"synthesize": approved["artifacts"]["synthesize"]}}
    with pytest.raises(ConfigError, match="what constitution has made is not what was approved"):
        world.curation()
    other = {**approved["artifacts"]["constitution"], "digest": "0" * 64}
    world.ti.xcoms["review"] = approved | {"artifacts": {**approved["artifacts"], "constitution": other}}
    with pytest.raises(ConfigError, match="what constitution has made is not what was approved"):
        world.curation()


@pytest.mark.parametrize("params", [{"review_made_data": False}, {"dry_run": True}])
def test_a_run_that_asks_no_person_skips_the_task_without_reading_anything(
    tmp_path: Path, params: dict[str, Any]
) -> None:
    world = World(tmp_path, **params)
    world.ti.xcoms = {"resolve": world.ti.xcoms["resolve"]}
    with pytest.raises(AirflowSkipException, match="asks no person"):
        world.task.execute(world.context)


def test_one_stage_that_made_nothing_in_this_run_is_not_read(tmp_path: Path) -> None:
    world = World(tmp_path, ai_feedback="off", constitution_prompts=[])
    _, body = question(run_info(), world.config, {Stage.SYNTHESIZE: world.made[Stage.SYNTHESIZE]}, {})
    assert world.config.reviewed == (Stage.SYNTHESIZE,)
    assert "constitution" not in body


def test_a_stage_without_artifact_is_named(world: World) -> None:
    del world.ti.xcoms["constitution"]
    with pytest.raises(StageConfigFailed, match="task 'constitution' left no artifact"):
        world.task.execute(world.context)


def test_mlflow_has_the_answer_on_the_run_and_on_the_runs_that_made_the_data(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it takes tags and no files, which keeps the run from nothing."""
    world.ti.xcoms["resolve"]["parent_run_id"] = "parent"
    world.ti.xcoms["synthesize"]["mlflow_run_id"] = "made"
    with serving(Tagged()) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        assert world.answer("Approve", "fine")["answer"]["by"] == "ada"
    assert Tagged.tags == {run: {"athanor.review": "approved by ada: fine"} for run in ("parent", "made")}


class Tagged(RegisteredModels):
    """Also takes tags of runs."""

    tags: ClassVar[dict[str, dict[str, str]]] = {}

    def answer(self, method: str, path: str, asked: dict[str, str]) -> tuple[int, dict[str, Any]]:
        if not path.endswith("runs/set-tag"):
            return super().answer(method, path, asked)
        self.tags.setdefault(asked["run_id"], {})[asked["key"]] = asked["value"]
        return 200, {}


def sampled(store: Store, ref: ArtifactRef, number: int) -> list[str]:
    return [sample.texts[-1][1] for sample in draw_samples(ref, Stage.SYNTHESIZE, number=number).samples]


def test_examples_are_drawn_by_the_content_and_shown_in_its_order(world: World) -> None:
    ref = world.made[Stage.SYNTHESIZE]
    some, all_of_them = sampled(world.store, ref, 5), sampled(world.store, ref, 100)
    assert some == sampled(world.store, ref, 5)
    assert len(all_of_them) == 12
    assert [all_of_them[place] for place in sorted(random.Random(ref.digest).sample(range(12), 5))] == some
    assert some not in (all_of_them[:5], all_of_them[-5:])


def test_a_transcript_that_is_none_is_an_error_that_names_it(tmp_path: Path) -> None:
    _, made = publish_made(tmp_path, transcript=[{"messages": [], "response": "x"}])
    with pytest.raises(DataError, match=r"transcript\.jsonl is not as its stage writes it: .*messages"):
        draw_samples(made[Stage.CONSTITUTION], Stage.CONSTITUTION, number=3)
