"""Guards by hand: what each measures, when patience ends, what is remembered, and which weights a stop returns."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stages.config.estimators import RLOO
from stages.config.rollouts import PPOConfig
from stages.train.best import BestBy
from stages.train.rollout.guards import (
    BeforeGuards,
    GuardWatch,
    drift,
    repeated_share,
    sampled_entropy,
    share_without_variance,
)
from tests.unit.train.rollout.test_rollout import configured, sampled

MAIN: Any = SimpleNamespace(is_main=True)
"""Four steps a rollout: 8 responses, 4 a step, 2 epochs."""


def guarded(*, eval_every: int = 2, num_rollouts: int = 10, **guards: Any) -> PPOConfig:
    return configured(eval_every=eval_every, num_rollouts=num_rollouts, guards=guards)


def rollout(watch: GuardWatch, **metrics: float) -> dict[str, float]:
    known = {"ppo/kl": 0.0, "ppo/response_length": 2.0, "ppo/finished": 1.0}
    return watch.after_rollout(MAIN, [sampled()], known | {f"ppo/{name}": value for name, value in metrics.items()})


def evaluation(watch: GuardWatch, gold: float, spread: float = 2.0) -> dict[str, float]:
    return watch.after_evaluation(MAIN, [], {"eval/gold_score": gold, "eval/gold_score_std": spread})


def test_repetition_is_the_share_of_ngrams_that_were_said_before() -> None:
    # (1 2) (2 1) (1 2) (2 1) (1 3): five, three of them different
    assert repeated_share(np.array([1, 2, 1, 2, 1, 3]), ngram=2) == pytest.approx(2 / 5)
    assert repeated_share(np.array([7] * 9), ngram=4) == pytest.approx(5 / 6)
    assert repeated_share(np.array([1, 2, 3]), ngram=4) == 0
    assert repeated_share(np.array([1, 2, 3, 4]), ngram=4) == 0


def test_drift_is_a_factor_both_ways() -> None:
    assert [drift(length, 10.0) for length in (10, 25, 4)] == [1.0, 2.5, 2.5]


def test_entropy_is_over_tokens_and_not_over_responses() -> None:
    long = replace(sampled(), logprobs_R=np.array([-1.0, -1.0, -1.0, -1.0], np.float32))
    short = replace(sampled(), logprobs_R=np.array([-6.0], np.float32))
    assert sampled_entropy([long, short]) == pytest.approx(2.0)


def test_a_group_has_no_variance_when_all_its_scores_are_one() -> None:
    scores = [(0, 1.0), (0, 1.0), (1, 1.0), (1, 0.0), (2, 0.5), (2, 0.5), (3, 0.0), (3, 1e-3)]
    samples = [sampled(group=group, score=score) for group, score in scores]
    assert share_without_variance(samples) == 0.5


def test_each_guard_measures_its_own_number() -> None:
    everything = {name: {"warn": 0.9} for name in ("repetition", "unfinished", "groups")}
    everything |= {"kl": {"warn": 9.0}, "entropy": {"warn": 0.1}, "length": {"warn": 9.0}}
    everything["repetition"] |= {"ngram": 1}
    config = configured(eval_every=0, guards=everything, estimator=RLOO(responses_per_prompt=2))
    watch = GuardWatch(config)
    metrics = {"ppo/kl": 3.0, "ppo/response_length": 5.0, "ppo/finished": 0.25}
    found = watch.after_rollout(MAIN, [sampled(), sampled()], metrics)
    expected = {"kl": 3.0, "length": 1.0, "repetition": 0.0, "entropy": 1.5, "unfinished": 0.75, "groups": 1.0}
    assert {name: found[f"ppo/guard/{name}"] for name in expected} == pytest.approx(expected)
    again = watch.after_rollout(
        MAIN, [replace(sampled(), response=np.array([8, 8]))], metrics | {"ppo/response_length": 2.0}
    )
    assert again["ppo/guard/length"] == 2.5
    assert again["ppo/guard/repetition"] == 0.5


def test_patience_counts_rollouts_in_a_row_and_begins_anew() -> None:
    watch = GuardWatch(guarded(kl={"warn": 5.0, "stop": 10.0, "patience": 2}))
    levels = [rollout(watch, kl=kl)["ppo/guard/kl_level"] for kl in (6, 4, 6, 6, 11, 9, 11)]
    assert levels == [0, 0, 0, 1, 1, 1, 1]
    assert not watch.ends
    assert rollout(watch, kl=12)["ppo/guard/kl_level"] == 2
    assert watch.ends
    said = "guard kl: KL to the reference (nats a response) is 12, above ppo.guards.kl.stop=10 in 2 rollouts in a row"
    assert watch.reason() == said
    warned, stopped = watch.ledger["guards"]["events"]
    assert (warned["level"], warned["step"], warned["times"], warned["value"]) == ("warn", 12, 1, 6)
    assert (stopped["level"], stopped["step"], stopped["limit"]) == ("stop", 28, 10)


def test_a_warning_that_comes_again_is_counted_and_not_listed_again() -> None:
    watch = GuardWatch(guarded(unfinished={"warn": 0.5, "patience": 1}))
    for finished in (0.1, 1.0, 0.2, 0.2, 1.0, 0.3):
        rollout(watch, finished=finished)
    (event,) = watch.ledger["guards"]["events"]
    assert (event["times"], event["step"], event["last_step"]) == (3, 0, 20)
    assert not watch.ends


def test_the_gold_guard_compares_with_the_best_in_spreads_of_the_first() -> None:
    watch = GuardWatch(guarded(gold={"stop": 0.5, "patience": 2}))
    values = [evaluation(watch, gold)["ppo/guard/gold"] for gold in (1.0, 3.0, 1.9, 2.5, 1.5)]
    assert values == pytest.approx([0.0, 0.0, 0.55, 0.25, 0.75])
    assert not watch.ends
    evaluation(watch, 1.0, spread=100.0)
    assert watch.ends
    assert watch.ledger["guards"]["events"][0]["step"] == 12, "the sixth evaluation, one every two steps"
    assert evaluation(watch, -9.0) == {}, "what a stopped training measures last decides nothing"


def test_a_resume_decides_alike() -> None:
    config = guarded(kl={"stop": 10.0, "patience": 3}, length={"warn": 1.5}, gold={"warn": 1.0, "stop": 2.0})
    whole, first = GuardWatch(config), GuardWatch(config)
    story = [(1.0, 2.0, 3.0), (11.0, 4.0, 4.0), (12.0, 4.0, 1.0), (13.0, 5.0, 0.0)]
    seen: list[Any] = []
    for watch in (whole, first):
        for kl, length, gold in story[:2]:
            rollout(watch, kl=kl, response_length=length)
            evaluation(watch, gold)
    resumed = GuardWatch(config)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for watch in (whole, resumed):
        seen.append(
            [(rollout(watch, kl=kl, response_length=length), evaluation(watch, gold)) for kl, length, gold in story[2:]]
        )
    assert seen[0] == seen[1]
    assert whole.state_dict() == resumed.state_dict()
    assert whole.ends
    assert whole.reason() == resumed.reason()


def history_of(watch: GuardWatch, config: PPOConfig, kls: list[float], golds: list[float]) -> list[dict[str, Any]]:
    """Rows of a training: of every step that is evaluated, two a rollout."""
    rows: list[dict[str, Any]] = []
    for kl in kls:
        metrics = rollout(watch, kl=kl)
        for _ in range(1 if watch.ends else config.steps_per_rollout // config.eval_every):
            step = len(rows) * 2 + (1 if watch.ends else 2)
            rows.append({"step": step, "eval/gold_score": golds[len(rows)], **metrics})
    return rows


def test_a_stopped_training_goes_back_to_before_the_first_rollout_beyond_the_limit() -> None:
    """Rollouts begin at steps 0, 4, 8, 12, 16; those at 12 and 16 are beyond, so step 8 sampled the last good one."""
    config = guarded(kl={"stop": 10.0, "patience": 2})
    watch = GuardWatch(config)
    history = history_of(watch, config, [1, 2, 3, 11, 12], [5, 6, 7, 1, 2, 9, 8, 9, 9])
    assert watch.ends
    assert [row["ppo/guard/good_step"] for row in history] == [0, 0, 4, 4, 8, 8, 8, 8, 8]
    last, best = BeforeGuards(watch, None, config), BeforeGuards(watch, BestBy("eval/gold_score", True, 2), config)
    assert (last.tripped, last.step(history)) == (True, 8)
    assert best.step(history) == 6, "gold liked steps 12 and 17 better, which are beyond the budget"


def test_what_may_be_gone_back_to_is_kept_at_every_moment() -> None:
    config = guarded(kl={"stop": 10.0, "patience": 3}, num_rollouts=9)
    rng = np.random.default_rng(0)
    for _ in range(20):
        kls = [*rng.choice([1.0, 11.0], size=5), 11.0, 11.0, 11.0]
        for by in (None, BestBy("eval/gold_score", True, 2)):
            watch = GuardWatch(config)
            fallback = BeforeGuards(watch, by, config)
            history = history_of(watch, config, kls, list(rng.normal(size=40)))
            kept: set[int] = set()
            for end in range(1, len(history) + 1):
                rows = history[:end]
                wanted = fallback.kept(rows)
                saved = {rows[-1]["step"]} & wanted
                assert wanted <= kept | saved, "a checkpoint that was removed cannot come back"
                assert len(wanted) <= config.guards.kl.patience + 2
                kept = wanted
            assert fallback.step(history) in kept | {None}


def test_where_no_evaluation_was_good_there_is_nothing_to_go_back_to() -> None:
    config = guarded(kl={"stop": 10.0, "patience": 1})
    watch = GuardWatch(config)
    history = history_of(watch, config, [1, 11], [0.0] * 9)
    assert BeforeGuards(watch, None, config).step(history) is None
    assert watch.good_step == 0


def test_a_fall_of_gold_alone_leaves_all_evaluations_to_choose_from() -> None:
    config = guarded(gold={"stop": 0.1, "patience": 1})
    watch = GuardWatch(config)
    rollout(watch)
    for gold in (1.0, 3.0, 1.0):
        evaluation(watch, gold)
    assert watch.ends
    assert watch.good_step == math.inf
    history = [{"step": step, "eval/gold_score": gold} for step, gold in ((2, 1.0), (4, 3.0), (6, 1.0))]
    assert BeforeGuards(watch, BestBy("eval/gold_score", True, 2), config).step(history) == 4
