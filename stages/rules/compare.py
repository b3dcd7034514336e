"""Rules that compare the text of a response with expected answers, or look at the text alone."""

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from stages.rules.failed import RuleFailedError

_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?|[-+]?\$?\.\d+")
_MARK = "####"
"""Before the final number in GSM8K's answers."""
PATTERN_SECONDS = 1.0
"""A regular expression may need time that grows exponentially with the response; after this one it is given up."""


def exact_match(response: str, answers: Sequence[str]) -> float:
    """Equal up to case, spaces and a final full stop."""
    return float(plain(response) in {plain(answer) for answer in answers})


def plain(text: str) -> str:
    return " ".join(text.split()).casefold().removesuffix(".").rstrip()


def number_match(response: str, answers: Sequence[str]) -> float:
    """The last number of the response equals that of an answer. GSM8K marks it by ####, where there is one."""
    found = last_number(response)
    return float(found is not None and found in {last_number(answer) for answer in answers})


def last_number(text: str) -> Decimal | None:
    """The number after #### if the text has that mark and a number follows, else the last one."""
    marked = _NUMBER.findall(text.rpartition(_MARK)[2]) if _MARK in text else []
    found = marked[0] if marked else next(reversed(_NUMBER.findall(text)), None)
    if found is None:
        return None
    try:
        return Decimal(found.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def regex_match(pattern: str, response: str, answers: Sequence[str]) -> float:
    """What the pattern finds last in the response, its first group or all of it, is one of the answers."""
    import regex

    try:
        found = list(regex.finditer(pattern, response, timeout=PATTERN_SECONDS))
    except TimeoutError:
        raise RuleFailedError("pattern_takes_too_long") from None
    except regex.error:
        raise RuleFailedError("pattern_is_invalid") from None
    if not found:
        return 0.0
    text = found[-1].group(1 if found[-1].re.groups else 0) or ""
    return exact_match(text, answers)


def regex_found(pattern: str, response: str) -> float:
    """The pattern occurs in the response."""
    import regex

    try:
        return float(regex.search(pattern, response, timeout=PATTERN_SECONDS) is not None)
    except TimeoutError:
        raise RuleFailedError("pattern_takes_too_long") from None
    except regex.error:  # a pattern of `re` that this library spells otherwise
        raise RuleFailedError("pattern_is_invalid") from None


def length_within(size: int, *, least: int, most: int, margin: int) -> float:
    """1 from `least` to `most`; outside it falls to 0 in a straight line over `margin`, at once when that is 0."""
    outside = max(least - size, size - most, 0)
    if not outside:
        return 1.0
    return max(0.0, 1.0 - outside / margin) if margin else 0.0
