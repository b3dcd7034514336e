"""Which texts stay: each rule with a text that it drops and one that it lets through."""

from typing import Any

import pytest

from stages.config.synthesis import SynthesizeConfig
from stages.data.synthesis.filters import Pool, Rules, repetition, support


def rules(**settings: Any) -> Rules:
    return Rules(
        SynthesizeConfig(**settings),
        is_in_language=lambda text: "ñ" not in text,
        declines=lambda text: text.startswith("I cannot"),
    )


def test_the_pool_refuses_what_is_as_similar_as_the_limit() -> None:
    pool = Pool(0.7)
    pool.add("Write a poem about the sea.")  # six words
    assert pool.is_near("write a poem about the SEA")
    assert pool.is_near("Write a story about the sea.")  # 2 x 5 / 12 = 0.83
    assert not pool.is_near("Write one story about the moon.")  # 2 x 3 / 12 = 0.5
    assert pool.is_near("Please write a poem about the big blue sea today.")  # 2 x 6 / 16 = 0.75
    assert not pool.is_near("Please now write a poem about the big blue sea today and for ever.")  # 12 / 20 = 0.6
    exact = Pool(1.0)
    exact.add("!?")
    assert exact.is_near("...")  # no words at all are alike


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Name three colours.", ""),
        ("Name colours", "too_short"),
        ("word " * 151, "too_long"),
        ("Describe this Picture in detail.", "excluded_word_picture"),
        ("Write a paragraph about cars.", ""),  # no word is excluded for being part of one
        (", and then write it down", "malformed"),
        ("12 34 56 78 = 99 11 22 33?", "malformed"),
        ("Sum up the text: [insert text here]", "malformed"),
        ("go on and go on and go on and go on and go on", "repetitive"),
        ("El niño ñ de uno dos tres cuatro cinco seis siete ocho", "other_language"),
        ("El niño ñ habla", ""),  # too few words to tell
        ('"Hello": translate it to French', ""),
    ],
)
def test_an_instruction_by_its_first_broken_rule(text: str, reason: str) -> None:
    assert rules(excluded_words=("picture", "para"), method="self_instruct").on_instruction(text) == reason


@pytest.mark.parametrize(
    ("text", "is_cut", "reason"),
    [
        ("Red, green and blue.", False, ""),
        ("Red, green and", True, "cut_off"),
        ("...", False, "too_short"),
        ("Name three of the colours of the rainbow.", False, "copies_prompt"),
        ("Dear [Your Name], hello", False, "placeholder"),
        ("so it is so it is so it is so it is", False, "repetitive"),
        ("I cannot help with that.", False, "refusal"),
    ],
)
def test_a_response_by_its_first_broken_rule(text: str, is_cut: bool, reason: str) -> None:
    found = rules(min_response_words=2).on_response(text, "Name three of the colours of the rainbow", is_cut=is_cut)
    assert found == reason
    assert rules(keep_refusals=True).on_response("I cannot help.", "Help", is_cut=False) == ""


def test_an_input_may_be_empty_and_not_the_instruction_again() -> None:
    assert rules().on_input("", "Sort these names") == ""
    assert rules().on_input("Zoe, Adam", "Sort these names") == ""
    assert rules().on_input("Sort these names.", "Sort these names") == "input_copies_instruction"
    assert rules().on_input("Zoe, Adam", "Sort these names", ["Ann, Bob", "zoe adam"]) == "input_copies_example"
    assert rules().on_input("Zoe, Eve", "Sort these names", ["Ann, Bob", "Zoe, Adam"]) == ""
    assert rules().on_input("[insert names]", "Sort these names") == "input_is_placeholder"
    assert rules().on_input("a b c " * 9, "Sort these names") == "input_is_repetitive"


def test_repetition_and_support_by_hand() -> None:
    assert repetition(["a", "b"]) == 0
    assert repetition(["a", "b", "c", "a", "b", "c"]) == pytest.approx(1 / 4)  # abc bca cab abc
    assert support("The ocean reaches eleven kilometres.", "An ocean of eleven or more") == pytest.approx(2 / 4)
    assert support("Yes, it is.", "no") == 1.0


def test_a_language_is_not_asked_for_with_a_score_of_zero() -> None:
    text = "ñ " * 3 + "uno dos tres cuatro cinco seis siete ocho nueve diez"
    assert rules(min_language_score=0).on_response(text, "?", is_cut=False) == ""
    assert rules().on_response(text, "?", is_cut=False) == "other_language"
