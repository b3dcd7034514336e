"""Measures of next-token prediction against arithmetic that a reader can redo by hand."""

import math

import pytest

from stages.losses.language import bits_per_byte, perplexity


def test_perplexity_and_bits() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert bits_per_byte(math.log(2) * 24, num_bytes=8) == pytest.approx(3.0)
