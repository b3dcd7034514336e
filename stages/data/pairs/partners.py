"""Pairs out of labelled responses: those to the same prompt of which one was found good and another one bad.

A response whose prompt has none of the other kind is in no pair. It is counted as `unpaired_label`. Sources of the
format `unpaired` keep all responses single, for KTO.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from stages.data.pairs.preferences import Labelled
from stages.data.pairs.reasons import joined
from stages.data.pairs.sides import Preference


@dataclass(frozen=True)
class PartnerOutcome:
    """What became of one labelled response: the pair that it stands for, or a reason."""

    key: str
    pair: Preference | None
    reason: str = ""
    sample: str = ""


def pairs_of(rows: Sequence[tuple[str, Labelled]]) -> Iterator[PartnerOutcome]:
    """Each row has exactly one outcome, in the order of the rows.

    Of a prompt's good and bad responses, each one of the larger group stands for a pair with one of the smaller group,
    which takes turns; those of the smaller group are counted as `joined`. So no response is left out.
    """
    groups: dict[tuple[tuple[str, str], ...], tuple[list[str], list[str]]] = {}
    labelled = dict(rows)
    for key, row in rows:
        prompt = tuple((turn["role"], turn["content"]) for turn in row.prompt)
        bad, good = groups.setdefault(prompt, ([], []))
        (good if row.is_good else bad).append(key)
    made = {outcome.key: outcome for bad, good in groups.values() for outcome in _grouped(good, bad, labelled)}
    for key, _ in rows:
        yield made[key]


def _grouped(good: list[str], bad: list[str], rows: dict[str, Labelled]) -> Iterable[PartnerOutcome]:
    if not good or not bad:
        return [PartnerOutcome(key, None, "unpaired_label", rows[key].response) for key in good or bad]
    larger, smaller = (good, bad) if len(good) >= len(bad) else (bad, good)
    outcomes = [PartnerOutcome(key, None, "joined", rows[key].response) for key in smaller]
    for place, key in enumerate(larger):
        one, other = rows[key], rows[smaller[place % len(smaller)]]
        chosen, rejected = (one, other) if one.is_good else (other, one)
        if chosen.response == rejected.response:
            outcomes.append(PartnerOutcome(key, None, "equal_sides", one.response))
            continue
        critiques = [
            f"{what}: {row.reason}" if row.reason else "" for what, row in (("chosen", chosen), ("rejected", rejected))
        ]
        pair = Preference(one.prompt, chosen.response, rejected.response, joined(critiques))
        outcomes.append(PartnerOutcome(key, pair))
    return outcomes
