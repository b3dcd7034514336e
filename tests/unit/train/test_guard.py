"""Steps that must not change the weights, by OLMo-core's rule."""

import json

import pytest

from stages.config.errors import NonFiniteError
from stages.config.train import OptimizerConfig
from stages.train.guard import StepGuard


def guard(window: int = 8, factor: float = 3.0) -> StepGuard:
    return StepGuard(OptimizerConfig(learning_rate=1e-3, spike_window=window, spike_factor=factor))


def judge(judged: StepGuard, steps: list[tuple[float, float]]) -> list[bool]:
    return [judged.judging(loss=loss, step=0)(norm) for loss, norm in steps]


CALM = [(2.0, 1.0), (2.2, 1.2), (1.8, 0.8), (2.0, 1.0)]


def test_a_loss_above_mean_plus_factor_times_spread_is_a_spike():
    """Losses 2, 2.2, 1.8, 2: mean 2, deviation sqrt(0.08 / 3) = 0.1633; three of them end at 2.4899."""
    assert judge(guard(), [*CALM, (2.489, 1.0)]) == [True] * 5
    assert judge(guard(), [*CALM, (2.491, 1.0)]) == [True] * 4 + [False]


def test_a_gradient_norm_counts_as_well_and_a_fall_never_does():
    assert judge(guard(), [*CALM, (2.0, 1.5)])[-1] is False
    assert judge(guard(), [*CALM, (0.1, 0.01)])[-1] is True


def test_nothing_is_a_spike_before_half_a_window_is_known():
    assert judge(guard(), [(2.0, 1.0), (2.0, 1.0), (2.0, 1.0), (9.0, 9.0)]) == [True] * 4


def test_a_level_that_stays_is_accepted_after_a_while():
    verdicts = judge(guard(), [*CALM, *[(5.0, 1.0)] * 6])
    assert verdicts[4] is False
    assert verdicts[-1] is True


def test_without_a_window_every_finite_step_is_accepted():
    assert judge(guard(window=0), [*CALM, (1e9, 1e9)])[-1] is True


def test_non_finite_steps_are_counted_apart_from_spikes_and_stay_out_of_the_window():
    judged = guard()
    assert judge(judged, [*CALM, (float("nan"), 1.0), (2.0, float("inf")), (2.1, 1.1), (9.0, 1.0)]) == (
        [True] * 4 + [False, False, True, False]
    )
    assert judged.metrics == {"train/skipped_steps": 3.0, "train/spike_steps": 1.0}


def test_five_non_finite_steps_in_a_row_end_the_training():
    judged = guard()
    judge(judged, [(float("nan"), 1.0)] * 4)
    with pytest.raises(NonFiniteError, match=r"5 steps in a row, up to step 7"):
        judged.judging(loss=1.0, step=7)(float("inf"))


def test_it_judges_on_from_a_checkpoint_as_if_nothing_had_happened():
    steps = [*CALM, (3.0, 1.0), (2.1, 1.0), (2.4, 1.3), (4.0, 1.0), (2.0, 0.9)]
    whole = guard()
    expected = judge(whole, steps)
    first, second = guard(), guard()
    verdicts = judge(first, steps[:5])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert verdicts + judge(second, steps[5:]) == expected
    assert second.metrics == whole.metrics
