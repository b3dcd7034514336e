"""How numbers are spelled, text is made harmless, and nested settings flattened."""

import pytest

from stages.config.execution import ExecutionConfig
from stages.config.nested import dotted
from stages.config.pipeline import Executions
from stages.config.text import byte_size, compact, duration, one_line, printable


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.2, "4.2 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (3720, "1 h 02 min"),
        (100_000, "27 h 46 min"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (-1536, "-1.5 KiB"),
        (3 * 2**30, "3.00 GiB"),
        (2**41, "2.00 TiB"),
    ],
)
def test_sizes_are_in_binary_units(size: float, text: str) -> None:
    assert byte_size(size) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (8192, "8.19 k"), (10_059_840, "10.1 M"), (3.2e21, "3.2 Z")],
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert compact(number) == text


def test_nested_settings_and_dotted_paths_are_the_same_table() -> None:
    nested = {"sft": {"seed": 1, "optimizer": {"learning_rate": 0.1}}, "sft.num_epochs": 2, "empty": {}, "list": [{}]}
    assert dotted(nested) == {"sft.seed": 1, "sft.optimizer.learning_rate": 0.1, "sft.num_epochs": 2, "list": [{}]}


def test_a_configuration_is_flattened_like_its_tree() -> None:
    config = Executions(sft=ExecutionConfig(micro_batch_size=3))
    assert dotted(config)["sft.micro_batch_size"] == 3
    assert dotted(config) == dotted(config.model_dump())


def test_text_for_people_keeps_what_is_readable() -> None:
    assert printable("Grüße 🜂\n\tعربي") == "Grüße 🜂\n\tعربي"
    assert printable("a\x7fb\x85\u202ec\ud800\ufffe\u2028") == "a\\u007fb\\u0085\\u202ec\\ud800\\ufffe\\u2028"
    assert printable("a\r\nb\rc") == "a\r\nb\\u000dc"
    assert printable("é 字 שלום \u200f 👩\u200d👧") == "é 字 שלום \u200f 👩\u200d👧"
    assert printable("\x1b[31m") == "\\u001b[31m"
    assert one_line("a\r\n b\tc") == "a b c"
    assert one_line("abcdef", at_most=3) == "abc… (3 more characters)"
