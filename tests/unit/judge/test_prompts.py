"""Prompts of judges: what is published stays, and texts cannot open places in them."""

from stages.config.judging import PLACES, SHIPPED_PROMPTS
from stages.judge.prompts import filled, prompt_digest, prompt_text


def test_a_published_prompt_never_changes() -> None:
    """Verdicts are kept under its digest: another text is another file."""
    assert {name: prompt_digest(name)[:16] for name in SHIPPED_PROMPTS} == {"pairwise-v1": "3b8116233495d814"}


def test_every_shipped_prompt_has_each_place_once() -> None:
    for name in SHIPPED_PROMPTS:
        assert [prompt_text(name).count(place) for place in PLACES] == [1, 1, 1]


def test_a_text_that_spells_a_place_out_stays_as_it_is() -> None:
    made = filled("Q {question} A {first} B {second}.", question="{first}", first="{second}", second="{question} {x}")
    assert made == "Q {first} A {second} B {question} {x}."
    assert filled("{second}|{first}|{question}", question="q", first="a", second="b") == "b|a|q"


def test_a_text_given_instead_of_a_name_is_the_prompt() -> None:
    assert prompt_text("{question}{first}{second}") == "{question}{first}{second}"
