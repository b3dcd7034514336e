"""Dynamic loss scaling halves at once and doubles with patience."""

import pytest
import torch

from stages.config.errors import ConfigError
from stages.train.engines.local import check_precision
from stages.train.loss_scale import LossScale


def test_an_overflow_halves_the_scale_and_many_good_steps_double_it() -> None:
    scale = LossScale(dynamic=True)
    start = scale.value
    scale.update(overflowed=True)
    assert scale.value == start / 2
    for _ in range(1999):
        scale.update(overflowed=False)
    assert scale.value == start / 2
    scale.update(overflowed=False)
    assert scale.value == start


def test_an_overflow_starts_the_count_of_good_steps_again() -> None:
    scale = LossScale(dynamic=True)
    start = scale.value
    for overflowed in [False] * 1999 + [True] + [False] * 1999:
        scale.update(overflowed=overflowed)
    assert scale.value == start / 2


def test_the_scale_and_its_count_survive_a_checkpoint() -> None:
    one, other = LossScale(dynamic=True), LossScale(dynamic=True)
    for overflowed in [True, *[False] * 1500]:
        one.update(overflowed=overflowed)
    other.load(one.state())
    for scale in (one, other):
        for _ in range(500):
            scale.update(overflowed=False)
    assert one.value == other.value == LossScale(dynamic=True).value


def test_without_float16_nothing_is_scaled_whatever_a_checkpoint_says() -> None:
    scale = LossScale(dynamic=False)
    scale.load(torch.tensor([1024.0, 3.0], dtype=torch.float64))
    scale.update(overflowed=True)
    assert scale.value == 1.0


def test_float16_is_refused_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match="precision='fp16' needs a GPU") as caught:
        check_precision("fp16", torch.device("cpu"))
    assert "bf16" in caught.value.advice
