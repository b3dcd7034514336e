"""Suites that share one pass over their items: a benchmark is run once for a model and gives one suite per metric."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from stages.artifacts.manifests import canonical_json
from stages.judge.suite import Better, Measurement, Score, Subject

VERSION = 1
"""Raise it when the same items and settings would give other values: what was measured before is measured again."""


SHARD = 256
"""Items of a long benchmark that are measured and kept together: the most that a kill costs, and what workers share."""


class Pass(Protocol):
    """Runs all items of a benchmark through a model."""

    def run(self, subject: Subject) -> dict[str, Measurement]:
        """Return the measurement of every facet."""
        ...


@dataclass
class Shared:
    """Keeps what the last model got, for the other suites of the same benchmark."""

    runs: Pass
    _last: tuple[str, dict[str, Measurement]] = ("", {})

    def measured(self, subject: Subject) -> dict[str, Measurement]:
        if self._last[0] != subject.identity or not self._last[1]:
            self._last = (subject.identity, self.runs.run(subject))
        return self._last[1]


@dataclass(frozen=True)
class Facet:
    """One suite: one metric of a benchmark."""

    name: str
    metric: str
    better: Better
    chance: float | None
    digest: str
    items: int
    """That can be used."""
    facet: str
    """Key of its measurement in what the pass returns."""
    shared: Shared = field(repr=False)
    bad: Mapping[str, int] = field(default_factory=dict)
    """Rows of the benchmark that are no items, by reason: they are skipped for every model."""
    shards: tuple["Facet", ...] = field(default=(), repr=False)
    """The items in parts that can be measured apart; none of a short benchmark."""

    def __len__(self) -> int:
        return self.items + sum(self.bad.values())

    def measure(self, subject: Subject) -> Measurement:
        if self.shards:
            return self.joined([shard.measure(subject) for shard in self.shards])
        return self.joined([self.shared.measured(subject)[self.facet]])

    def joined(self, parts: Sequence[Measurement]) -> Measurement:
        """The measurement of all items, from those of the shards in their order."""
        scores = [score for part in parts for score in part.scores]
        skipped = sum((part.skipped for part in parts), Counter(self.bad))
        return Measurement(scores, skipped, all(part.is_final for part in parts))


def in_shards(facets: Sequence[Facet], whole: Any) -> list[Facet]:
    """Cut the facets of a long benchmark into shards; `whole` is the pass that they share, which has `items`."""
    if len(whole.items) <= SHARD:
        return list(facets)
    starts = range(0, len(whole.items), SHARD)
    passes = [replace(whole, items=whole.items[start : start + SHARD]) for start in starts]
    shared = [Shared(part) for part in passes]
    return [
        replace(
            facet,
            shards=tuple(
                replace(
                    facet,
                    name=f"{facet.name}/{number}",
                    digest=digest_of("shard", facet.digest, SHARD, number),
                    items=len(part.items),
                    shared=shared[number],
                    bad={},
                )
                for number, part in enumerate(passes)
            ),
        )
        for facet in facets
    ]


@dataclass(frozen=True)
class Unavailable:
    """A suite without items here, such as one of held-out prompts in a run that has none; it says why."""

    name: str
    metric: str
    reason: str
    better: Better = ""
    chance: float | None = None

    @property
    def digest(self) -> str:
        return digest_of("unavailable", self.name, self.reason)

    def __len__(self) -> int:
        return 1  # the one that stands for all that are missing

    def measure(self, subject: Subject) -> Measurement:
        return Measurement(skipped=Counter({self.reason: 1}))


class Tally:
    """Collects scores and reasons; a value that is no finite number is a reason."""

    def __init__(self) -> None:
        self.result = Measurement()

    def add(self, item: str, value: float, *, cluster: str = "", tokens: int = 0, response: str = "") -> None:
        if not np.isfinite(value):
            self.skip("not_finite")
            return
        self.result.scores.append(Score(item, float(value), cluster, tokens, response))

    def skip(self, reason: str, count: int = 1) -> None:
        self.result.skipped[reason] += count


def silent() -> None:
    """In the place of a watchdog's beat, where none watches."""


def digest_of(*parts: Any) -> str:
    """Hash over all that decides the values of a suite, in JSON's terms."""
    return hashlib.sha256(canonical_json([VERSION, *parts])).hexdigest()


def all_skipped(names: Iterable[str], reason: str, count: int, *, is_final: bool = True) -> dict[str, Measurement]:
    """What a model gets that none of the items can be asked of."""
    return {name: Measurement(skipped=Counter({reason: count}), is_final=is_final) for name in names}
