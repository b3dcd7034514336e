"""A comparison of two methods with invented numbers, for tests of what is drawn from it."""

from typing import Any

from stages.config.compare import Combination
from stages.config.compare_results import ComparedModel, Comparison, Estimate, Versus
from stages.config.graph import Stage
from stages.config.memory import TrainingMemory
from stages.config.request import Cost

MIB = 1 << 20


def estimate(value: float, around: float = 0.1) -> Estimate:
    return Estimate(value=value, low=value - around, high=value + around, items=128)


def combination(method: str, *, beta: float = 0.1, seed: int = 0, stage: Stage = Stage.DPO) -> Combination:
    return Combination(
        method=method, stage=stage, beta=beta, seed=seed, settings=40, changed=() if beta == 0.1 else (f"beta={beta}",)
    )


def memory(mib: int) -> TrainingMemory:
    """Parameters of so many MiB, trained by AdamW, with as much again for the rest."""
    size = mib * MIB
    return TrainingMemory(
        device="cpu",
        parameters=size,
        gradients=size,
        optimizer=2 * size,
        frozen=0,
        libraries=400 * MIB,
        peak=400 * MIB + 5 * size,
        rest=size,
    )


def model(number: int, told: Combination, *, gold: float, proxy: float, kl: float, **changes: Any) -> ComparedModel:
    values: dict[str, Any] = {
        "gold": estimate(gold - 0.5),
        "gold_gain": estimate(gold),
        "gold_gain_sd": gold * 2,
        "gold_win_rate": estimate(0.5 + gold / 4, 0.05),
        "proxy_gain": estimate(proxy),
        "proxy_gain_sd": proxy * 2,
        "kl": estimate(kl, 0.2),
        "response_length": 20.0 + number,
        "steps": 32,
        "memory": memory(number + 1),
        "cost": Cost(wall_seconds=60.0 * (number + 1), cpu_seconds=100.0 * (number + 1)),
        "uri": f"file:///store/artifacts/{told.stage.value}-model/{number}",
    }
    return ComparedModel(number=number, combination=told, **{**values, **changes})


def comparison(*, first: str = "dpo", second: str = "ppo", **changes: Any) -> Comparison:
    """Two betas and two seeds of each; the second method is hacked at beta 0.01, and one of its models failed."""
    models = (
        model(0, combination(first, seed=0), gold=0.4, proxy=0.5, kl=2.0),
        model(1, combination(first, seed=1), gold=0.6, proxy=0.7, kl=2.5),
        model(2, combination(first, beta=0.01, seed=0), gold=0.2, proxy=0.6, kl=8.0),
        model(3, combination(first, beta=0.01, seed=1), gold=0.3, proxy=0.6, kl=9.0),
        model(4, combination(second, seed=0, stage=Stage.PPO), gold=0.3, proxy=0.9, kl=3.0),
        model(5, combination(second, seed=1, stage=Stage.PPO), gold=0.1, proxy=1.1, kl=4.0),
        model(6, combination(second, beta=0.01, seed=0, stage=Stage.PPO), gold=-0.4, proxy=2.0, kl=20.0),
        ComparedModel(
            number=7,
            combination=combination(second, beta=0.01, seed=1, stage=Stage.PPO),
            failure="ppo failed (non_finite): 5 steps in a row, up to step 7, had a loss that is no number",
        ),
    )
    values: dict[str, Any] = {
        "title": "comparison",
        "start": "sft",
        "models": models,
        "versus": (Versus(method=first, against=second, win_rate=estimate(0.58, 0.04), pairs=3),),
        "reward_accuracy": 0.81,
        "gold_agreement": estimate(0.8, 0.05),
    }
    return Comparison(**{**values, **changes})
