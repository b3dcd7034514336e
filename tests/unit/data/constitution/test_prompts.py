"""Prompts of conversations, pairs, transcripts and bare questions: each once, drawn by seed, counted otherwise."""

from pathlib import Path
from typing import Any

import pytest

from stages.config.errors import DataError
from stages.config.principles import Area
from stages.data.constitution.prompts import PromptsAccount, prompt_of, read_prompts
from stages.data.pairs.turns import Unusable
from tests.constitutions import ALL, config_of
from tests.curating import write_jsonl

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "Why?"}, ["Why?"]),
        ({"instruction": "Add", "input": "2 + 2", "output": "4"}, ["Add\n\n2 + 2"]),
        ({"messages": CHAT}, ["Hi", "Hello", "Why?"]),
        ({"messages": [*CHAT, {"role": "assistant", "content": "So"}]}, ["Hi", "Hello", "Why?"]),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So"}]}, ["Why?"]),
        ({"chosen": "\n\nHuman: Why?\n\nAssistant: So", "rejected": "\n\nHuman: Why?\n\nAssistant: No"}, ["Why?"]),
        ({"chosen": [CHAT[0], CHAT[1]], "rejected": [CHAT[0], CHAT[1]]}, ["Hi"]),
        ({"prompt": "Why?", "system": "Be brief"}, ["Be brief", "Why?"]),
    ],
)
def test_a_prompt_is_what_stands_before_the_last_response(row: dict[str, Any], turns: list[str]) -> None:
    assert [turn["content"] for turn in prompt_of(row)] == turns


@pytest.mark.parametrize("row", [{"text": "x"}, {"prompt": "  "}, {"messages": [CHAT[1]]}, {"chosen": "no transcript"}])
def test_a_row_without_a_prompt_is_unusable(row: dict[str, Any]) -> None:
    with pytest.raises(Unusable):
        prompt_of(row)


def test_each_prompt_is_used_once_and_the_account_conserves(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "One?"}, {"prompt": "Two?"}, {"prompt": "One?"}, {"x": 1}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "Two?"}, {"prompt": "Three?"}])
    account = PromptsAccount()
    found = read_prompts(config_of(prompts=[f"{first}#area=harmless", second]), account)
    assert {(one.text, one.areas) for one in found} == {
        ("One?", frozenset({Area.HARMLESS})),
        ("Two?", frozenset({Area.HARMLESS})),
        ("Three?", ALL),
    }
    assert account.to_dict(len(found)) == {"in": 6, "kept": 3, "dropped": {"duplicate": 2, "no_prompt": 1}}


def test_the_cap_is_shared_among_the_sources_and_drawn_by_the_seed(tmp_path: Path) -> None:
    many = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"Question {number}?"} for number in range(50)])
    few = write_jsonl(tmp_path / "b.jsonl", [{"prompt": f"Other {number}?"} for number in range(3)])

    def drawn(seed: int) -> list[str]:
        account = PromptsAccount()
        found = read_prompts(config_of(prompts=[many, few], num_prompts=10, seed=seed), account)
        assert account.to_dict(len(found))["dropped"] == {"over_num_prompts": 43}
        return [one.text for one in found]

    assert sum(text.startswith("Other") for text in drawn(0)) == 3
    assert len(drawn(0)) == 10
    assert drawn(0) == drawn(0) != drawn(1)


def test_sources_without_a_prompt_are_refused_with_the_counts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"x": 1}, {"x": 2}])
    with pytest.raises(DataError, match=r"hold no prompt; dropped: \{'no_prompt': 2\}"):
        read_prompts(config_of(prompts=[path]), PromptsAccount())
