"""Limits of guards: what is refused, with what to do, and that none of them changes what was made before."""

from typing import Any

import pytest

from stages.config.errors import ConfigError
from stages.config.guards import EntropyGuard, KLGuard
from stages.config.resolve import resolve
from stages.config.rollouts import PPOConfig


def of(**guards: Any) -> PPOConfig:
    """The tiny recipe with settings of guards by their paths, evaluating every two steps."""
    given = {f"ppo.guards.{name.replace('__', '.')}": value for name, value in guards.items()}
    return resolve({"recipe": "tiny", "overrides": {"ppo.eval_every": 2, **given}}).ppo


def test_a_config_without_guards_has_the_identity_of_before() -> None:
    assert "guards" not in of().identity()
    assert of().guards.configured == {}
    found = of(kl__stop=20.0).identity()["guards"]
    assert found["kl"] == {"warn": 0.0, "stop": 20.0, "patience": 2}


def test_what_is_beyond_a_limit_depends_on_the_side_of_the_guard() -> None:
    assert [KLGuard(stop=2.0).breaks(value, 2.0) for value in (1.9, 2.0, 2.1, float("nan"))] == [
        False,
        False,
        True,
        True,
    ]
    floor = EntropyGuard(warn=1.0, stop=0.5)
    assert [floor.breaks(value, 0.5) for value in (0.6, 0.5, 0.4, float("nan"))] == [False, False, True, True]
    assert not floor.breaks(9.0, 0.0), "a limit of 0 is none"


@pytest.mark.parametrize(
    ("guards", "said"),
    [
        ({"kl__warn": 20.0, "kl__stop": 10.0}, "stop=10 would end the training before warn=20 warns; use a stop above"),
        ({"entropy__warn": 0.5, "entropy__stop": 1.0}, "use a stop below 0.5, or warn=0"),
        ({"kl__patience": 3}, "patience=3 needs a limit, got warn=0 and stop=0"),
        ({"repetition__ngram": 3}, "ngram=3 needs a limit"),
        ({"repetition__stop": 1.0}, "stop=1 is a share that nothing exceeds; use less than 1"),
        ({"unfinished__warn": 1.5}, "warn=1.5 is a share that nothing exceeds"),
        ({"length__warn": 0.5}, "warn=0.5 is no factor that a change could stay below; use more than 1"),
        ({"groups__stop": 0.9}, "guards.groups.stop=0.9 needs estimator.responses_per_prompt >= 2, got 1"),
        ({"gold__warn": 0.5}, r"ppo.guards.gold.warn=0.5 needs a gold scorer, and this run has none"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(guards: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        of(**guards)
    assert said in f"{refused.value.message} {refused.value.advice}"


def test_what_goes_back_to_earlier_weights_needs_evaluations_and_warnings_do_not() -> None:
    def without_evaluations(**guards: Any) -> PPOConfig:
        return PPOConfig.model_validate(of().model_dump() | {"eval_every": 0, "guards": guards})

    assert without_evaluations(kl={"warn": 10.0}).guards.kl.on
    with pytest.raises(
        ValueError, match=r"guards\.kl\.stop=20 needs eval_every >= 1, got 0: .* no weights to go back to"
    ):
        without_evaluations(kl={"stop": 20.0})
    with pytest.raises(ValueError, match=r"guards\.gold\.warn=1 needs eval_every >= 1, got 0"):
        without_evaluations(gold={"warn": 1.0})


def test_a_group_guard_goes_with_every_estimator_that_samples_several() -> None:
    config = resolve({"recipe": "tiny", "overrides": {"ppo.estimator.kind": "grpo", "ppo.guards.groups.warn": 0.5}}).ppo
    assert list(config.guards.configured) == ["groups"]
