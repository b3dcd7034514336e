"""The review of made data in the form: which stages it is about, and where it would have no effect."""

from typing import Any

import pytest

from stages.config.closing import Approval, Verdict
from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.config.made_counts import by_principle, made_rows, spent, step_counts
from stages.config.resolve import resolve
from stages.config.review import ReviewConfig, ReviewRecord
from tests.made_records import CONSTITUTION, SYNTHETIC

GIVEN = {"recipe": "tiny", "base_model": "/models/x", "instructions": ["/i.jsonl"], "preferences": ["/p.jsonl"]}
SYNTHESIS = {"synthesis": "distillation", "synthesis_sources": ["/s.jsonl"]}
FEEDBACK = {"ai_feedback": "pairs", "constitution_prompts": ["/p.jsonl"]}


@pytest.mark.parametrize(
    ("asked", "reviewed"),
    [
        (SYNTHESIS, (Stage.SYNTHESIZE,)),
        (FEEDBACK, (Stage.CONSTITUTION,)),
        (SYNTHESIS | FEEDBACK, (Stage.CONSTITUTION, Stage.SYNTHESIZE)),
        (SYNTHESIS | {"last_stage": "synthesize"}, (Stage.SYNTHESIZE,)),
    ],
)
def test_a_person_reads_what_the_stages_of_the_run_make(asked: dict[str, Any], reviewed: tuple[Stage, ...]) -> None:
    assert resolve({**GIVEN, **asked, "review_made_data": True}).reviewed == reviewed
    assert resolve({**GIVEN, **asked}).reviewed == ()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"review_made_data": True}, "review_made_data=True, and ai_feedback and synthesis are off"),
        (
            SYNTHESIS | {"overrides": {"review.num_samples": 3}},
            r"review\.num_samples=3 has no effect: no person reads made data",
        ),
        (
            SYNTHESIS | {"review_made_data": True, "overrides": {"review.timeout_hours": 0}},
            r"review\.timeout_hours=0: .*greater than 0",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve({**GIVEN, **changes})


def test_settings_reach_the_run_and_no_stage() -> None:
    asked = {**GIVEN, **SYNTHESIS, "review_made_data": True}
    changed = resolve({**asked, "overrides": {"review.timeout_hours": 2, "review.num_samples": 3}})
    assert changed.review == ReviewConfig(timeout_hours=2, num_samples=3)
    usual = resolve({**GIVEN, **SYNTHESIS})
    assert all(usual.stage_config(stage) == changed.stage_config(stage) for stage in usual.selected)


def test_the_answer_in_one_line() -> None:
    def told(**answer: Any) -> str:
        return ReviewRecord(artifacts={}, answer=Approval(at="2026-11-30T09:30:00+00:00", **answer)).summary()

    assert told(verdict=Verdict.APPROVED, by="ada") == "approved by ada"
    assert told(verdict=Verdict.REJECTED, comment="no") == "rejected by an unnamed user: no"
    assert told(verdict=Verdict.TIMED_OUT) == "rejected, because no answer came in time"


def test_counts_stand_in_the_order_of_the_work_whatever_the_order_in_the_manifest() -> None:
    ledger = dict(sorted(CONSTITUTION.items()))
    assert [(step.name, step.entered, step.kept) for step in step_counts(ledger)] == [
        ("prompts", 4, 4),
        ("responses", 4, 2),
        ("critiques and revisions", 4, 2),
        ("comparisons", 3, 2),
    ]
    assert [step.name for step in step_counts(SYNTHETIC)] == ["sources", "responses", "rows"]
    nothing = {**SYNTHETIC, "inputs": {"in": 0, "kept": 0, "dropped": {}}}
    assert step_counts(nothing) == step_counts(SYNTHETIC)
    assert {name: (rounds.kept, compared.entered) for name, (rounds, compared) in by_principle(ledger).items()} == {
        "be-kind": (0, 3),
        "no-harm": (2, 0),
    }


def test_what_was_asked_of_every_model_and_what_came_of_it() -> None:
    assert [(one.does, one.model, one.requests, one.cost) for one in spent(CONSTITUTION)] == [
        ("critic", "big-model", 28, 3.5),
        ("responder", "x", 8, None),
    ]
    assert [(one.does, one.model, one.answer_tokens) for one in spent(SYNTHETIC)] == [("generator", "m", 700)]
    assert made_rows(CONSTITUTION) == "2 conversations for SFT, 3 preference pairs"
    assert (spent({}), made_rows({}), step_counts({})) == ([], "", [])
