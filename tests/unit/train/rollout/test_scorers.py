"""Scores of rules and mixtures in rollouts, and a training whose reward is a rule alone."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import ppo
from stages.config.estimators import RLOO
from stages.config.graph import Stage
from stages.config.scorers import MixtureScorer, RegexRule
from stages.config.train import OptimizerConfig
from stages.data.tokens.packing import RowBudget, TokenSequence
from stages.data.tokens.views import Split, TokensArtifact
from stages.models.build import new_causal_lm
from stages.models.generation import Sampling
from stages.rules.ready import Row, Value
from stages.train.engine import Engine
from stages.train.engines.choose import make_engine
from stages.train.rollout.experience import describe
from stages.train.rollout.sampling import Sampler
from stages.train.rollout.scorers.ready import ready_parts
from stages.train.rollout.scorers.texts import Part, Parts
from stages.train.rollout.scoring import Score
from tests.small_world import CONFIGS, MODEL, make_context, make_models, make_tokens

CONFIG: Any = CONFIGS[Stage.PPO]


class ByModel:
    """Stands where the reward model does: the score is the length, a reward is in units of ten."""

    def scores(self, engine: Engine, sequences: Sequence[TokenSequence]) -> list[Score]:
        return [Score(float(sequence.loss_mask.sum())) for sequence in sequences]

    def rewards(self, scores: Sequence[float]) -> list[float]:
        return [score / 10 for score in scores]

    def state_dict(self) -> dict[str, Any]:
        return {"scale": [0.0, 10.0]}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Counting:
    """Gives each response the number in its row's reference, and remembers what it was asked."""

    on_main_only = False

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def values(self, responses: Sequence[str], rows: Sequence[Row]) -> list[Value]:
        self.asked += zip(responses, (row.prompt for row in rows), strict=True)
        return [Value(float(row.reference[0]), "" if row.prompt == "a" else "no_value") for row in rows]

    def account(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("world")
    tokens = make_tokens(home)
    artifact = TokensArtifact(Path(tokens.uri.removeprefix("file://")))
    engine = make_engine(
        {"policy": new_causal_lm(MODEL, artifact, seed=3)},
        CONFIG,
        make_context(home, Stage.PPO, CONFIG).execution,
    )
    sampler = Sampler(
        Sampling(4, eos_id=artifact.eos_id, pad_id=artifact.pad_id),
        seed=0,
        scorer=ByModel(),
        reference=engine.freeze(new_causal_lm(MODEL, artifact, seed=3)),
        budget=RowBudget(row_length=64, max_rows=2),
    )
    return home, tokens, artifact, engine, sampler


def test_a_mixture_adds_scores_and_rewards_by_weight_and_asks_once_for_each_response(world) -> None:
    _, _, artifact, engine, sampler = world
    counting, decode = Counting(), artifact.tokenizer().decode
    parts = (Part("model", 2.0, None), Part("rule", -0.5, counting))
    mixed = replace(sampler, parts=Parts(parts, lambda ids: decode(ids.tolist())))
    rows = [Row(prompt="a", reference=("3",)), Row(prompt="b", reference=("7",))]
    samples = mixed.sample(engine, [np.array([40, 41]), np.array([50])], stream=0, responses_per_prompt=2, rows=rows)
    lengths, given = [len(sample.response) for sample in samples], [3.0, 3.0, 7.0, 7.0]
    assert [sample.score for sample in samples] == [2 * a - 0.5 * b for a, b in zip(lengths, given, strict=True)]
    assert mixed.rewards(samples) == pytest.approx([0.2 * a - 0.5 * b for a, b in zip(lengths, given, strict=True)])
    assert counting.asked == [
        (decode(sample.response.tolist()), "ab"[number // 2]) for number, sample in enumerate(samples)
    ]
    told = describe(samples)
    assert (told["ppo/score/rule"], told["ppo/score/model"]) == (5.0, np.mean(lengths))
    assert (told["ppo/score_failed/rule"], told["ppo/score"]) == (0.5, np.mean([sample.score for sample in samples]))
    assert mixed.state_dict() == {"scale": [0.0, 10.0]}


def test_a_rule_alone_needs_no_model(world) -> None:
    _, _, artifact, engine, sampler = world
    config = CONFIG.model_copy(update={"scorer": RegexRule(pattern="e")})
    alone = replace(sampler, scorer=None, parts=ready_parts(config, artifact))
    samples = alone.sample(engine, [np.array([40, 41])] * 8, stream=0, rows=[Row()] * 8)
    texts = [artifact.tokenizer().decode(sample.response.tolist()) for sample in samples]
    assert [sample.score for sample in samples] == [float("e" in text) for text in texts]
    assert alone.rewards(samples) == [sample.score for sample in samples]
    assert alone.state_dict() == {}


def test_parts_are_named_by_their_titles(world) -> None:
    _, _, artifact, *_ = world
    parts = [
        {"weight": 1, "scorer": {"kind": "reward_model"}},
        {"weight": 2, "name": "brief", "scorer": {"kind": "length"}},
    ]
    config = CONFIG.model_copy(update={"scorer": MixtureScorer.model_validate({"parts": parts})})
    ready = ready_parts(config, artifact)
    assert ready is not None
    assert [(part.name, part.weight, part.scorer is None) for part in ready.parts] == [
        ("reward_model", 1, True),
        ("brief", 2, False),
    ]
    assert ready_parts(CONFIG, artifact) is None


def test_training_by_a_rule_alone_raises_its_rate_without_any_reward_model(world) -> None:
    home, tokens, *_ = world
    inputs = make_models(home, tokens)[Stage.PPO]
    config = CONFIG.model_copy(
        update={
            "scorer": RegexRule(pattern="[a-m]"),
            "estimator": RLOO(responses_per_prompt=4),
            "optimizer": OptimizerConfig(learning_rate=2e-2, warmup_fraction=0.0),
            "num_rollouts": 8,
            "rollout_size": 32,
            "global_batch_size": 16,
            "max_response_length": 3,
            "kl_coefficient": 0.0,
            "missing_eos_penalty": 0.0,
        }
    )
    context = make_context(home, Stage.PPO, config, {role: inputs[role] for role in ("tokens", "model")})
    try:
        outcome = ppo.run(context)
    finally:
        context.progress.close()
    history = [json.loads(line) for line in (context.output_dir / "history.jsonl").read_text().splitlines()]
    assert history[0]["ppo/score/regex"] < 0.45
    assert outcome.metrics["ppo/score/regex"] > 0.8
    assert outcome.metrics["eval/score/regex"] > 0.6
    assert outcome.ledger["prompts"] == len(TokensArtifact(context.input_dir("tokens")).prompts(Split.TRAIN))
