"""How alike two texts are in their words: ROUGE-L, after Lin 2004, "ROUGE: A Package for Automatic Evaluation of
Summaries" (the section on the longest common subsequence), with precision and recall weighted alike (beta = 1)."""

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """The words of a text, in small letters and without punctuation."""
    return _WORD.findall(text.lower())


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    A row of the usual table grows by 0 or 1 from one column to the next, so it fits into the bits of an integer, and
    a whole row costs a few operations (Crochemore et al. 2001, "A fast and practical bit-vector algorithm for the
    longest common subsequence problem").
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    all_ones = (1 << len(first)) - 1
    # A 0 at a place says that the row's value grows there.
    row = all_ones
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & all_ones
    return len(first) - row.bit_count()


def rouge_l(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """F = 2 P R / (P + R) with P = LCS / words of the candidate and R = LCS / words of the reference, which is twice
    the LCS over the words of both; 0 where one of them is empty."""
    if not candidate or not reference:
        return 0.0
    return 2.0 * lcs_length(candidate, reference) / (len(candidate) + len(reference))
