"""How well a model predicts given continuations: bits per byte, and how often it would write exactly that.

Both compare across tokenizers, which likelihoods by token do not.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from stages.data.sources.records import utf8_size
from stages.judge.benchmarks.asking import EMPTY, CannotAskError, Pair, chat_pair, plain_pair
from stages.judge.benchmarks.facets import Facet, Shared, Tally, digest_of, in_shards, silent
from stages.judge.benchmarks.items import ContinuationItem, Items
from stages.judge.benchmarks.likelihood import fits, likelihoods
from stages.judge.heldout import TOO_LONG
from stages.judge.suite import Measurement, Subject

BITS, GREEDY = "bits", "greedy"


@dataclass(frozen=True)
class ContinuationPass:
    """All continuations, scored once."""

    items: tuple[ContinuationItem, ...]
    chat: bool
    beat: Callable[[], None] = silent

    def run(self, subject: Subject) -> dict[str, Measurement]:
        tallies = {BITS: Tally(), GREEDY: Tally()}
        asked: list[tuple[ContinuationItem, Pair]] = []
        for item in self.items:
            try:
                asked.append((item, self._pair(subject, item)))
            except CannotAskError as reason:
                for tally in tallies.values():
                    tally.skip(str(reason))
        found = likelihoods(subject, [pair for _, pair in asked], beat=self.beat)
        for (item, _), score in zip(asked, found, strict=True):
            bits = -score.logprob / math.log(2) / utf8_size(item.continuation)
            tallies[BITS].add(item.id, bits, cluster=item.cluster, tokens=score.tokens)
            tallies[GREEDY].add(item.id, float(score.greedy), cluster=item.cluster, tokens=score.tokens)
        return {name: tally.result for name, tally in tallies.items()}

    def _pair(self, subject: Subject, item: ContinuationItem) -> Pair:
        make = chat_pair if self.chat else plain_pair
        pair = make(subject.tokenizer, item.context, item.continuation)
        if not len(pair.continuation):
            raise CannotAskError(EMPTY)
        if not fits(subject, pair):
            raise CannotAskError(TOO_LONG)
        return pair


def continuation_suites(name: str, items: Items, *, chat: bool, beat: Callable[[], None] = silent) -> list[Facet]:
    """The suite of bits per byte, and that of exact greedy continuations, as LAMBADA counts them."""
    found = tuple(item for item in items.items if isinstance(item, ContinuationItem))
    told = [asdict(item) for item in found]
    whole = ContinuationPass(found, chat, beat)
    shared = Shared(whole)
    common = {"chance": None, "items": len(found), "shared": shared, "bad": items.bad}
    bits = digest_of("continuation", BITS, chat, told)
    greedy = digest_of("continuation", GREEDY, chat, told)
    facets = [
        Facet(name=name, metric="bits_per_byte", better="lower", facet=BITS, digest=bits, **common),
        Facet(name=f"{name}-greedy", metric="accuracy", better="higher", facet=GREEDY, digest=greedy, **common),
    ]
    return in_shards(facets, whole)
