"""ROUGE-L by hand, and its subsequence against the table that everybody knows."""

import random

import pytest

from stages.losses.overlap import lcs_length, rouge_l, words


def by_table(first: str, second: str) -> int:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for row, left in enumerate(first, start=1):
        for column, right in enumerate(second, start=1):
            same = table[row - 1][column - 1] + 1
            table[row][column] = same if left == right else max(table[row - 1][column], table[row][column - 1])
    return table[-1][-1]


def test_the_subsequence_is_that_of_the_table() -> None:
    draw = random.Random(0)
    for _ in range(400):
        first, second = ("".join(draw.choices("abcd", k=draw.randint(0, 90))) for _ in range(2))
        assert lcs_length(first, second) == by_table(first, second)


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        # Six of six and six words have "write a about the sea" in common: 5; 2 x 5 / 12.
        ("Write a poem about the sea.", "Write a story about the sea!", 10 / 12),
        # Three of three words, in a text of nine: 2 x 3 / 12.
        ("police kill gunman", "Police, it is said, did kill the armed gunman", 6 / 12),
        ("the same", "The same.", 1.0),
        ("one two", "three four", 0.0),
        ("one two three", "three two one", 2 / 6),
        ("", "three", 0.0),
    ],
)
def test_rouge_l_by_hand(candidate: str, reference: str, expected: float) -> None:
    assert rouge_l(words(candidate), words(reference)) == pytest.approx(expected)
    assert rouge_l(words(reference), words(candidate)) == pytest.approx(expected)


def test_words_are_letters_and_digits_in_any_script() -> None:
    assert words("It's 3 o'clock, snake_case: Größe 漢字!") == [
        "it",
        "s",
        "3",
        "o",
        "clock",
        "snake",
        "case",
        "größe",
        "漢字",
    ]
