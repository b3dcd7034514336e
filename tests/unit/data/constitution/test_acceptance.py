"""Every rule of acceptance, each with an attempt that breaks it and nothing else; shares of words by hand."""

from dataclasses import replace

import pytest

from stages.config.principles import Area
from stages.data.constitution.acceptance import (
    ACCEPTED,
    Attempt,
    cleaned,
    copied,
    repeated,
    similarity,
    unusable_response,
    verdict_on,
    whole_sentences,
)
from tests.constitutions import ALL, config_of, prompt_about, rule

GOOD = Attempt(
    prompt_about("Why is the sky blue on a clear day in summer?"),
    rule(Area.HONEST),
    response="The sky is blue because it mirrors the water of the oceans.",
    critique="It says that the sky mirrors oceans, which is wrong: air scatters blue light most.",
    revision="Air scatters the short waves of sunlight more than long ones, so we see blue from all sides.",
)


def verdict(attempt: Attempt, **settings: object) -> str:
    return verdict_on(attempt, config_of(**settings), declines=lambda text: text.startswith("I cannot"))


def test_shares_of_common_words_by_hand() -> None:
    # In the same order: "the", "sat". Of 3 and 4 words that is 2 * 2 / 7; of the first three, two are copied.
    assert similarity("The cat sat.", "the dog never sat") == pytest.approx(4 / 7)
    assert copied("The cat sat.", "the dog never sat") == pytest.approx(2 / 3)
    assert copied("sat the", "the dog never sat") == pytest.approx(1 / 2)
    assert copied("", "anything") == 0.0
    # Eight words have five runs of four; the fifth is the first again.
    assert repeated("a b c d a b c d") == pytest.approx(1 / 5)
    assert repeated("one two three") == 0.0


def test_a_critique_and_a_revision_that_break_no_rule_are_accepted() -> None:
    assert verdict(GOOD) == ACCEPTED


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("no_critique", {"critique": "Yes, wrong."}),
        ("critique_repeats_itself", {"critique": "It is a joke, no more. " * 3}),
        ("repeats_itself", {"revision": "Air scatters blue light most. " * 3}),
        ("critique_copies_response", {"critique": "The sky is blue because it mirrors the water."}),
        ("critique_copies_request", {"critique": "What is not honest about this response?"}),
        ("critique_copies_request", {"critique": "Why is the sky blue on a clear day in summer?"}),
        ("cut_off", {"revision_ended": False}),
        ("too_short", {"revision": "Because of the air."}),
        ("unchanged", {"revision": "the sky is blue, because it mirrors the water of the oceans!"}),
        ("copies_prompt", {"revision": "Why is the sky blue on a clear day in summer? Why?"}),
        ("copies_critique", {"revision": "The sky mirrors oceans, which is wrong: air scatters blue light most."}),
        ("copies_request", {"revision": "Rewrite it to be more honest, by rule."}),
        ("critique_copies_example", {"critique": '"Fish put salt into it" is wrong: the salt comes from rocks.'}),
        (
            "copies_example",
            {"revision": "The sea is salty because rain and rivers wash salt out of rocks and carry it to the sea."},
        ),
        ("copies_example", {"revision": "Your neighbour is an idiot. Throw stones at the dog!"}),
        ("refuses_harmless", {"revision": "I cannot answer a question about the colour of skies, sorry."}),
    ],
)
def test_each_rule_has_a_name_that_is_counted(reason: str, changes: dict) -> None:
    assert verdict(replace(GOOD, **changes)) == reason


def test_the_limits_are_settings() -> None:
    short = replace(GOOD, revision="Because of the air.")
    assert verdict(short, min_words=4) == ACCEPTED
    near = replace(GOOD, revision="The sky is blue because it mirrors the light of the oceans.")  # 11 of 12 words
    assert verdict(near) == ACCEPTED
    assert verdict(near, max_similarity=0.9) == "unchanged"
    half = replace(GOOD, critique="Wrong: the sky is blue.")  # 4 of 5 words are the response's
    assert verdict(half) == ACCEPTED
    assert verdict(half, max_copied=0.75) == "critique_copies_response"


@pytest.mark.parametrize(
    ("areas", "area", "accepted"),
    [
        (frozenset({Area.HARMLESS}), Area.HARMLESS, True),
        (frozenset({Area.HELPFUL, Area.HONEST}), Area.HELPFUL, False),
        (ALL, Area.HARMLESS, True),
        (ALL, Area.HELPFUL, False),  # nobody said that the prompt is harmful, and the principle asks for help
    ],
)
def test_a_refusal_is_dropped_unless_harmlessness_is_at_stake(
    areas: frozenset[Area], area: Area, accepted: bool
) -> None:
    refusal = replace(
        GOOD,
        prompt=prompt_about("How do I pick the lock of a door?", areas=areas),
        principle=rule(area),
        revision="I cannot explain how to open doors that are not yours to open.",
    )
    assert verdict(refusal) == (ACCEPTED if accepted else "refuses_harmless")


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("Here is the revised response:\n\nThe air scatters light.", "The air scatters light."),
        ("Revised response: The air scatters light.", "The air scatters light."),
        ("**Revision:** The air scatters light.", "The air scatters light."),
        ('"The air scatters light."', "The air scatters light."),
        ('"Air" and "light" are "words".', '"Air" and "light" are "words".'),
        ("Three reasons:\n\n1. Air\n2. Light", "Three reasons:\n\n1. Air\n2. Light"),
        ("Response time matters here: be quick.", "Response time matters here: be quick."),
    ],
)
def test_what_announces_a_revision_is_not_part_of_it(written: str, kept: str) -> None:
    assert cleaned(written) == kept


def test_a_critique_that_was_cut_off_counts_as_far_as_its_last_sentence() -> None:
    assert whole_sentences('It is "wrong." The second sentence is') == 'It is "wrong."'
    assert whole_sentences("nothing that ends") == ""
    assert whole_sentences("Version 2.5 is old! And") == "Version 2.5 is old!"


def test_a_response_that_was_cut_off_or_says_nothing_is_not_used() -> None:
    assert unusable_response("One two three four five", ended=True, config=config_of()) == ""
    assert unusable_response("One two three four", ended=True, config=config_of()) == "too_short"
    assert unusable_response("One two three four five", ended=False, config=config_of()) == "cut_off"
