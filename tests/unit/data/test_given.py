"""Rows that users bring: the common shapes are understood, everything else has a reason."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from stages.config.curate import CurateConfig
from stages.data.given import instruction_row, preference_row, split_transcript

SHARED = Path(__file__).parents[4] / "shared" / "data"
_CONFIG = CurateConfig(heldout_fraction=0.0)


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"instruction": "Add.", "input": "1 2", "response": "3"}, "Add.\n\n1 2"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Add."),
        ({"prompt": "Add.", "response": " 3 "}, "Add."),
        ({"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]}, "Add."),
    ],
)
def test_instruction_shapes(values: dict[str, Any], prompt: str) -> None:
    row = instruction_row("k", values, "src", _CONFIG)
    assert isinstance(row, dict)
    assert row["messages"] == [{"role": "user", "content": prompt}, {"role": "assistant", "content": "3"}]
    assert (row["origin"], row["group"]) == ("given", "src")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"instruction": "Add."}, "no_response"),
        ({"instruction": "Add.", "response": "  "}, "no_response"),
        ({"instruction": "Add.", "response": None}, "no_response"),
        ({"response": "3"}, "no_instruction"),
        ({"messages": []}, "no_messages"),
        ({"messages": [{"role": "user", "content": "Add."}]}, "no_response"),
        ({"messages": [{"role": "robot", "content": "3"}]}, "malformed_message"),
        ({"messages": [{"role": "assistant", "content": "3"}]}, "no_instruction"),
    ],
)
def test_unusable_instructions_have_a_reason(values: dict[str, Any], reason: str) -> None:
    assert instruction_row("k", values, "src", _CONFIG) == reason


def test_preference_shapes_agree() -> None:
    plain = preference_row("k", {"prompt": "Q", "chosen": "good", "rejected": "bad"}, "s", _CONFIG)
    head = "\n\nHuman: Q\n\nAssistant:"
    transcript = preference_row("k", {"chosen": f"{head} good", "rejected": f"{head} bad"}, "s", _CONFIG)
    assert plain == transcript
    assert isinstance(plain, dict)
    assert (plain["chosen"], plain["rejected"], plain["kind"]) == ("good", "bad", "given")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "Q", "chosen": "same", "rejected": " same "}, "equal_sides"),
        ({"prompt": "Q", "chosen": "good"}, "side_missing"),
        ({"prompt": "Q", "chosen": "good", "rejected": ""}, "side_missing"),
        ({"chosen": "good", "rejected": "bad"}, "no_prompt"),
        ({"prompt": " ", "chosen": "good", "rejected": "bad"}, "no_prompt"),
        ({"chosen": "Human: A\n\nAssistant: x", "rejected": "Human: B\n\nAssistant: y"}, "prompts_differ"),
    ],
)
def test_unusable_preferences_have_a_reason(values: dict[str, Any], reason: str) -> None:
    assert preference_row("k", values, "src", _CONFIG) == reason


def test_a_transcript_is_split_at_its_last_answer() -> None:
    text = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\nlines\n\nAssistant: four"
    assert split_transcript(text) == (
        [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three\nlines"},
        ],
        "four",
    )
    assert split_transcript("\n\nHuman: one") is None


def test_equal_prompts_are_held_out_together() -> None:
    config = CurateConfig(heldout_fraction=0.5)
    for number in range(40):
        prompt = f"question {number}"
        first = instruction_row("a", {"prompt": prompt, "response": "x"}, "s", config)
        second = instruction_row("b", {"prompt": prompt, "response": "y"}, "s", config)
        third = preference_row("c", {"prompt": prompt, "chosen": "x", "rejected": "y"}, "s", config)
        assert isinstance(first, dict)
        assert isinstance(second, dict)
        assert isinstance(third, dict)
        assert first["heldout"] == second["heldout"] == third["heldout"]


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there")
def test_real_preference_transcripts_are_understood() -> None:
    with gzip.open(SHARED / "preference" / "hh_harmless_base_test.jsonl.gz", "rt") as file:
        rows = [preference_row(str(n), json.loads(line), "hh", _CONFIG) for n, line in enumerate(file)]
    good = [row for row in rows if isinstance(row, dict)]
    assert len(rows) == 2312
    assert len(good) > 2200
    assert {row for row in rows if isinstance(row, str)} <= {"side_missing", "equal_sides", "prompts_differ"}
    assert all(row["prompt"][-1]["role"] == "user" for row in good)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there")
@pytest.mark.parametrize("name", ["gpteacher_codegen.json.gz", "gpteacher_roleplay.json.gz"])
def test_real_instructions_are_understood(name: str) -> None:
    with gzip.open(SHARED / "sft" / name, "rt") as file:
        rows = [instruction_row(str(n), values, "s", _CONFIG) for n, values in enumerate(json.load(file))]
    assert sum(isinstance(row, dict) for row in rows) > 0.98 * len(rows)
