"""Settings of scorers."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from stages.config.errors import ConfigError
from stages.config.graph import Stage
from stages.config.pipeline import PipelineConfig
from stages.config.resolve import resolve
from stages.config.scorers import MixtureScorer, ScorerConfig, described, endpoints_of, reads_reward_model


def parse(**settings: object) -> ScorerConfig:
    return TypeAdapter(ScorerConfig).validate_python(settings)


NUMBER, LENGTH, REWARD = {"kind": "number"}, {"kind": "length"}, {"kind": "reward_model"}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "regex"}, "pattern is empty"),
        ({"kind": "regex", "pattern": "("}, "no regular expression"),
        ({"kind": "length", "least": 5, "most": 4}, "least=5 is more than most=4"),
        ({"kind": "function"}, "must be module:name"),
        ({"kind": "function", "function": "a:b", "sha256": "1"}, "64 hexadecimal digits"),
        ({"kind": "mixture", "parts": [{"weight": 1, "scorer": NUMBER}]}, "at least two"),
        (
            {"kind": "mixture", "parts": [{"weight": 1, "scorer": NUMBER}, {"weight": 2, "scorer": NUMBER}]},
            r"\['number'\] appear twice",
        ),
        (
            {"kind": "mixture", "parts": [{"weight": 0, "scorer": NUMBER}, {"weight": 2, "scorer": LENGTH}]},
            "weight=0",
        ),
        (
            {
                "kind": "mixture",
                "parts": [{"name": name, "weight": 1, "scorer": REWARD} for name in ("one", "two")],
            },
            "reward_model appears twice",
        ),
        ({"kind": "mixture", "parts": [{"name": "A B", "weight": 1, "scorer": NUMBER}]}, "lower-case"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        parse(**settings)


def test_a_mixture_knows_what_its_parts_need() -> None:
    parts = [{"weight": 1, "scorer": NUMBER}, {"weight": -0.5, "name": "long", "scorer": LENGTH}]
    mixture = parse(kind="mixture", parts=parts)
    assert isinstance(mixture, MixtureScorer)
    assert mixture.needs == ("reference",)
    assert not reads_reward_model(mixture)
    assert described(mixture) == "1 x number + -0.5 x long"
    assert reads_reward_model(parse(kind="mixture", parts=[*parts, {"weight": 1, "scorer": REWARD}]))
    assert parse(kind="json_schema").needs == ("schema",)
    assert parse(kind="json_schema", json_schema="{}").needs == ()


def test_a_judge_is_asked_at_an_address_with_a_rubric_that_shows_the_response() -> None:
    endpoint = {"endpoint": "http://127.0.0.1:1/v1", "model": "m"}
    for settings, problem in (
        ({}, r"endpoint\.endpoint is empty"),
        ({"endpoint": endpoint, "lowest": 5, "highest": 5}, "lowest=5 is not below highest=5"),
        ({"endpoint": endpoint, "prompt": "Rate {prompt}."}, "has no place"),
    ):
        with pytest.raises(ValidationError, match=problem):
            parse(kind="judge", **settings)
    judge = parse(kind="judge", endpoint=endpoint, prompt="{prompt} {response} {reference}")
    assert judge.needs == ("reference",)
    assert list(endpoints_of(judge, "ppo.scorer")) == ["ppo.scorer.endpoint"]
    mixture = parse(kind="mixture", parts=[{"weight": 1, "scorer": NUMBER}, {"weight": 1, "scorer": judge}])
    assert list(endpoints_of(mixture, "ppo.scorer")) == ["ppo.scorer.parts[1].scorer.endpoint"]
    # How fast it is asked decides nothing.
    fast = parse(kind="judge", endpoint={**endpoint, "concurrency": 9}, prompt="{prompt} {response} {reference}")
    assert fast.identity() == judge.identity()


def resolved(**values: Any) -> PipelineConfig:
    return resolve({"recipe": "tiny", "alignment": "ppo", **values})


RULE = {"ppo.scorer.kind": "length", "ppo.estimator.kind": "rloo"}


def test_a_run_scored_by_rules_trains_and_holds_no_reward_model() -> None:
    run, usual = resolved(overrides=RULE), resolved()
    assert usual.selected - run.selected == {Stage.REWARD}
    assert set(run.stage_inputs(Stage.PPO)) == {"tokens", "model"}
    assert (run.ppo.models.trained, run.ppo.models.frozen) == (1, 1)
    asked = resolved(overrides=RULE, train_reward=True)  # for the evaluation
    assert Stage.REWARD in asked.selected
    assert "reward" not in asked.stage_inputs(Stage.PPO)
    assert "reward" in asked.stage_inputs(Stage.EVALUATE)
    parts = [{"weight": 1, "scorer": {"kind": kind}} for kind in ("reward_model", "length")]
    mixed = resolved(overrides={"ppo.scorer.kind": "mixture", "ppo.scorer.parts": parts})
    assert "reward" in mixed.stage_inputs(Stage.PPO)


def test_reinforcement_learning_on_prompt_sets_alone_reads_no_other_data() -> None:
    overrides = {**RULE, "ppo.scorer.kind": "number"}
    run = resolved(base_model="/m", first_stage="ppo", prompts=["/data/q.jsonl"], overrides=overrides)
    assert (run.ppo.prompts_from, run.curate.prompts) == ("prompts", ("/data/q.jsonl",))
    assert (run.curate.documents, run.curate.instructions, run.curate.preferences) == ((), (), ())
    assert dict(run.curate.outside_sources) == {"/data/q.jsonl": "prompts"}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"overrides": {"ppo.scorer.kind": "length"}}, r"estimator\.critic=reward_model needs a reward model"),
        ({"overrides": {**RULE, "ppo.scorer.kind": "number"}}, "needs reference of each prompt"),
        ({"overrides": {**RULE, "ppo.scorer.kind": "regex"}}, "pattern is empty"),
        ({"overrides": {**RULE, "ppo.scorer.kind": "praise"}}, "does not exist"),
        ({"prompts": ["/q"], "overrides": {"ppo.prompts_from": "instructions"}}, "no stage answers them"),
        ({"prompts": ["/q"], "alignment": "dpo"}, "no stage answers them"),
        ({"prompts": ["/q#weight=2"]}, "all prompts are asked alike"),
        ({"prompts": ["derived"]}, "is a source of instructions and preferences"),
        ({"prompts": ["/q#format=poem"]}, "format='poem' of '/q' is not one of gsm8k, rows"),
        ({"overrides": {"ppo.prompts_from": "prompts"}}, "prompts is empty, and ppo has nothing to work on"),
        (
            {"base_model": "/m", "reward_model": "/r", "last_stage": "ppo", "overrides": RULE},
            "reward_model is given and no stage of this run reads it",
        ),
        (
            {
                "overrides": {
                    **RULE,
                    "ppo.scorer.kind": "judge",
                    "ppo.scorer.endpoint.endpoint": "https://elsewhere.example/v1",
                    "ppo.scorer.endpoint.model": "m",
                }
            },
            r"ppo\.scorer\.endpoint\.endpoint='https://elsewhere.example/v1' is not an endpoint that may be asked",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_runs(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        resolved(**values)


def test_what_was_trained_before_there_were_scorers_keeps_its_fingerprint() -> None:
    usual = resolved().ppo
    assert not {"scorer", "prompts_from"} & usual.identity().keys()
    assert resolved(overrides=RULE).ppo.identity()["scorer"]["kind"] == "length"
    assert "prompts" not in resolved().curate.identity()
