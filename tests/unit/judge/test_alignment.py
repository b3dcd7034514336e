"""Gains and win rates of a comparison, from scores that a reader can add up."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.config.compare import Combination
from stages.config.compare_results import spread
from stages.config.errors import DataError
from stages.config.graph import Stage
from stages.config.request import Manifest
from stages.judge.alignment import Measured, compared_model, comparison_of
from stages.judge.scores import write_scores
from stages.judge.suite import Score
from tests.compared import combination

START = [0.0, 1.0, 2.0, 3.0]
"""Gold scores of the start's answers: mean 1.5, standard deviation sqrt(5) / 2."""


def evaluated(folder: Path, role: str, gold: list[float], **changes: Any) -> Measured:
    """An evaluation of one model and the SFT model that it started from, on the prompts 0 and on."""
    folder.mkdir(parents=True)
    columns = {role: gold, "sft": START}
    write_scores(
        folder,
        {
            ("gold", one): [Score(f"prompt-{n}", value) for n, value in enumerate(values)]
            for one, values in columns.items()
        },
    )
    suites = {
        "gold": suite({one: sum(values) / len(values) for one, values in columns.items()}),
        "kl": suite({role: 3.5}),
        "gold_agreement": suite({"gold": 0.75}),
    }
    compared = {"role": role, "against": "sft", "suite": "gold", "difference": 0.0, "low": 0.0, "high": 0.0}
    report = {
        "models": {role: {"eval/response_length": 21.5}, "sft": {}},
        "reward": {"reward/accuracy": 0.8},
        "suites": suites,
        "comparisons": [{**compared, "level": 0.05, "p": 1.0, "items": 4, "clusters": 4}],
        **changes,
    }
    (folder / "metrics.json").write_text(json.dumps(report))
    return Measured.read(folder, stage=Stage(role), uri="file:///e")


def suite(values: dict[str, float]) -> dict[str, Any]:
    roles = {role: {"value": value, "low": value - 1, "high": value + 1, "items": 4} for role, value in values.items()}
    return {"metric": "m", "better": "higher", "digest": "d", "items": 4, "roles": roles}


def manifest(stage: Stage, **execution: Any) -> Manifest:
    return Manifest(
        kind=f"{stage.value}-model",
        stage=stage,
        version=1,
        fingerprint="f",
        digest="d",
        files=(),
        inputs=(),
        config={},
        execution=execution,
        ledger={"steps": 12},
        created_at="2026-11-23T09:00:00+00:00",
    )


def test_a_gain_is_the_mean_difference_prompt_by_prompt(tmp_path: Path) -> None:
    measured = evaluated(tmp_path / "e", "dpo", [1.0, 1.0, 4.0, 2.0])
    found = compared_model(0, combination("dpo"), manifest(Stage.DPO), measured)
    assert found.gold_gain is not None
    assert found.gold_win_rate is not None
    # Differences 1, 0, 2, -1: mean 0.5; two won, one tied, one lost: 2.5 of 4.
    assert found.gold_gain.value == pytest.approx(0.5)
    assert found.gold_gain.low < 0 < found.gold_gain.high
    assert found.gold_win_rate.value == pytest.approx(0.625)
    assert found.gold_gain_sd == pytest.approx(0.5 / (5**0.5 / 2))
    assert found.gold is not None
    assert (found.gold.value, found.gold.low) == (2.0, 1.0)  # as the evaluation published it
    assert (found.kl and found.kl.value, found.response_length, found.steps) == (3.5, 21.5, 12)
    assert found.proxy_gain is None  # the evaluation has no reward model
    assert found.memory is None


def test_only_prompts_that_both_answered_count(tmp_path: Path) -> None:
    measured = evaluated(tmp_path / "e", "dpo", [1.0, 2.0])  # of the start's 0 and 1
    found = compared_model(0, combination("dpo"), manifest(Stage.DPO), measured)
    assert found.gold_gain is not None
    assert (found.gold_gain.value, found.gold_gain.items) == (1.0, 2)


def named(method: str, stage: Stage, seed: int = 0) -> Combination:
    return combination(method, seed=seed, stage=stage)


def test_methods_meet_at_equal_betas_and_seeds_on_the_same_prompts(tmp_path: Path) -> None:
    told = [
        (named("dpo", Stage.DPO, 0), [1.0, 1.0, 1.0, 1.0]),
        (named("dpo", Stage.DPO, 1), [9.0, 9.0, 9.0, 9.0]),
        (named("ppo", Stage.PPO, 0), [0.0, 0.0, 1.0, 2.0]),
    ]
    measured = {n: evaluated(tmp_path / str(n), one.stage.value, gold) for n, (one, gold) in enumerate(told)}
    models = [compared_model(n, one, manifest(one.stage), measured[n]) for n, (one, _) in enumerate(told)]
    found = comparison_of("c", models, measured)
    ((versus),) = found.versus
    # Seed 1 has no opponent. Of seed 0: won, won, tied, lost.
    assert (versus.method, versus.against, versus.pairs) == ("dpo", "ppo", 1)
    assert versus.win_rate.value == pytest.approx(0.625)
    assert (found.start, found.reward_accuracy) == ("sft", 0.8)
    assert found.gold_agreement is not None
    assert found.gold_agreement.value == 0.75


def test_a_prompt_that_several_pairs_answer_is_one_cluster(tmp_path: Path) -> None:
    """Twice the same models know no more than once."""
    gold = {"dpo": [1.0, 1.0, 1.0, 0.0], "ppo": [0.0, 0.0, 0.0, 1.0]}

    def rate(seeds: int, folder: str) -> Any:
        told = [named(stage.value, stage, seed) for seed in range(seeds) for stage in (Stage.DPO, Stage.PPO)]
        measured = {
            n: evaluated(tmp_path / folder / str(n), one.method, gold[one.method]) for n, one in enumerate(told)
        }
        models = [compared_model(n, one, manifest(one.stage), measured[n]) for n, one in enumerate(told)]
        return comparison_of("c", models, measured).versus[0].win_rate

    once, twice = rate(1, "once"), rate(2, "twice")
    assert (twice.low, twice.high, twice.value) == (once.low, once.high, once.value)


def test_the_champion_is_no_start(tmp_path: Path) -> None:
    one = {"role": "dpo", "suite": "gold", "difference": 0.0, "low": 0.0, "high": 0.0, "level": 0.05, "p": 1.0}
    pairs = [{**one, "against": other, "items": 1, "clusters": 1} for other in ("champion", "sft")]
    assert evaluated(tmp_path / "e", "dpo", START, comparisons=pairs).start == "sft"


def test_an_evaluation_that_is_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics.json .*models"):
        evaluated(tmp_path / "e", "dpo", START, models=3)


def test_a_spread_over_seeds_is_the_sample_deviation() -> None:
    found = spread([1.0, 2.0, 6.0])
    assert found is not None
    # Mean 3, squares 4 + 1 + 9 = 14, divided by two.
    assert (found.mean, found.low, found.high, found.count) == (3.0, 1.0, 6.0, 3)
    assert found.deviation == pytest.approx(7**0.5)
    assert spread([]) is None
    alone = spread([2.0])
    assert alone is not None
    assert alone.deviation is None
