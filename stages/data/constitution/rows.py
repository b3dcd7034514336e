"""What is published for curation: conversations with their revised response, and preference pairs with their reason."""

from collections.abc import Iterator, Sequence
from typing import Any

from stages.data.constitution.work import FIRST, SECOND, Worked
from stages.data.pairs.turns import Message

REVISION, LABELLED = "revision", "labelled"
"""Kinds of pairs: a revision against what it revises, and two samples compared by a principle."""


def instructions(worked: Sequence[Worked]) -> Iterator[dict[str, Any]]:
    """One conversation for each revised response, in the format `messages`, with where it comes from."""
    for one in worked:
        if one.revision:
            yield {
                "messages": [*map(_untrained, one.messages), {"role": "assistant", "content": one.revision}],
                "areas": _unlike(each.area for each in one.accepted),
                "principles": _unlike(each.principle for each in one.accepted),
                "prompt_id": one.id,
                "source": one.source,
            }


def preferences(worked: Sequence[Worked]) -> Iterator[dict[str, Any]]:
    """Pairs in the format `pair`. Areas and principles stand as the reasons, which curation keeps with a pair, so that
    what learns from pairs or is measured on them can tell helpfulness from harmlessness."""
    for one in worked:
        if one.revision:
            areas = _unlike(each.area for each in one.accepted)
            principles = _unlike(each.principle for each in one.accepted)
            yield _pair(one, one.revision, one.response, areas, principles, made=REVISION)
        compared = one.comparison
        if compared is not None and compared.outcome in (FIRST, SECOND):
            better, worse = one.response, compared.second
            if compared.outcome == SECOND:
                better, worse = worse, better
            yield _pair(one, better, worse, [compared.area], [compared.principle], made=LABELLED)


def _pair(
    one: Worked, chosen: str, rejected: str, areas: list[str], principles: list[str], *, made: str
) -> dict[str, Any]:
    return {
        "prompt": list(one.messages),
        "chosen": chosen,
        "rejected": rejected,
        "reasons": [*areas, *principles],
        "made": made,
        "prompt_id": one.id,
        "source": one.source,
    }


def _untrained(message: Message) -> Message:
    """Earlier turns of the assistant were written by someone else and are no example."""
    return {**message, "weight": 0} if message["role"] == "assistant" else dict(message)


def _unlike(names: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(names))
