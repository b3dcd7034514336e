"""The gold reward of tests/alignment and its labels, by hand."""

import math
import random

import pytest

from tests.alignment.gold import SCALE, Labelled, bayes_limit, gold_reward, label, preferred_share

ASKED = "What does the function `open` return?"


@pytest.mark.parametrize(
    ("response", "points"),
    [
        ("", 0.0),
        # letters alone, three of seven words common, a full stop, five words from twelve, words of the prompt
        ("The function will return a new file.", 2.0 + 2.0 + 1.0 + 0.5 + 1.0),
        # no common word, no full stop, nine words from twelve
        ("Some function here", 2.0 + 0.1 + 1.0),
        # half of the words common, six words, of whose five pairs one is repeated; no word of the prompt
        ("A file a file. a file.", 2.0 + 2.0 + 1.0 + 0.4 - 2 * 0.2),
        # one of four words is common: five eighths of the points; one is not of letters alone
        ("x_1 is short here.", 2 * 0.75 + 2 * 0.625 + 1.0 + 0.2),
        ("no " * 26 + "end.", 2.0 + 1.0 - 2 * (25 - 1) / 26),
        ("`x_1` 2", 0.0),
    ],
)
def test_points_by_hand(response: str, points: float) -> None:
    assert gold_reward(ASKED, response) == pytest.approx(points)


def test_labels_follow_bradley_terry_and_a_tenth_is_turned_round() -> None:
    drawn = 1 / (1 + math.exp(-SCALE))
    assert preferred_share(2.0, 1.0) == pytest.approx(0.9 * drawn + 0.1 * (1 - drawn))
    assert preferred_share(1.0, 1.0) == pytest.approx(0.5)
    assert preferred_share(1e3, 0.0) == pytest.approx(0.9)
    assert preferred_share(0.0, 2.0) + preferred_share(2.0, 0.0) == pytest.approx(1.0)


def test_whoever_knows_the_reward_is_right_as_often_as_the_limit_says() -> None:
    rng = random.Random(0)
    good, bad = "The function will return a new file.", "Some function here"
    pairs = [label(ASKED, *((good, bad) if number % 2 else (bad, good)), rng) for number in range(4000)]
    limit = bayes_limit(pairs)
    assert limit == pytest.approx(preferred_share(6.5, 3.1))
    assert sum(pair.chosen == good for pair in pairs) / len(pairs) == pytest.approx(limit, abs=0.02)
    assert bayes_limit([Labelled("p", "a", "b", 0.9), Labelled("p", "a", "b", 0.5)]) == pytest.approx(0.7)
