"""Utilisation is work over time over peak, and waiting is counted where it happens."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from stages.data.tokens.packing import TokenSequence, lay_out
from stages.models.flops import FlopCounter
from stages.train.throughput import Meter, peak_flops, with_waiting


def test_two_models_that_do_half_of_the_peak() -> None:
    policy, critic = FlopCounter(100, 0, 0), FlopCounter(50, 0, 0)
    meter = Meter((policy, critic), peak_flops=1800.0)
    batch = lay_out([TokenSequence(np.array([1, 2, 3]), np.array([0, 1, 1]))])
    assert meter.flops(batch) == 6 * 150 * 3
    assert meter.utilisation(meter.flops(batch), seconds=3.0) == 0.5


def test_the_measured_peak_is_a_rate_that_this_machine_can_have() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14


def test_waiting_for_an_item_is_counted_and_using_it_is_not() -> None:
    def slow() -> Iterator[str]:
        yield "at once"
        time.sleep(0.05)
        yield "later"

    waited = {}
    for item, seconds in with_waiting(slow()):
        waited[item] = seconds
        time.sleep(0.1)
    assert waited["at once"] < 0.05
    assert waited["later"] == pytest.approx(0.05, abs=0.04)
