"""Multiple choice by likelihood: the option that the model finds likeliest, by byte of its text, is its answer.

Divided by the UTF-8 bytes of the option (`acc_bytes` of lm-evaluation-harness), long options have the same chance as
short ones, and models with different tokenizers compare. The same without division is the suite `<name>-raw`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from stages.data.sources.records import utf8_size
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.judge.benchmarks.asking import EMPTY, CannotAskError, Pair, chat_pair, plain_pair
from stages.judge.benchmarks.facets import Facet, Shared, Tally, digest_of, in_shards, silent
from stages.judge.benchmarks.items import ChoiceItem, Items, Option
from stages.judge.benchmarks.likelihood import Likelihood, fits, likelihoods
from stages.judge.heldout import TOO_LONG
from stages.judge.suite import Measurement, Subject

NORMALISED, RAW = "normalised", "raw"


@dataclass(frozen=True)
class ChoicePass:
    """All options of all items, scored once."""

    items: tuple[ChoiceItem, ...]
    chat: bool
    beat: Callable[[], None] = silent

    def run(self, subject: Subject) -> dict[str, Measurement]:
        tallies = {NORMALISED: Tally(), RAW: Tally()}
        asked: list[tuple[ChoiceItem, list[Pair]]] = []
        for item in self.items:
            try:
                pairs = [_pair(subject.tokenizer, option, chat=self.chat) for option in item.options]
                _require_fit(subject, pairs)
            except CannotAskError as reason:
                for tally in tallies.values():
                    tally.skip(str(reason))
                continue
            asked.append((item, pairs))
        found = iter(likelihoods(subject, [pair for _, pairs in asked for pair in pairs], beat=self.beat))
        for item, pairs in asked:
            scores = [next(found) for _ in pairs]
            sizes = np.array([utf8_size(option.text) for option in item.options])
            logprobs = np.array([score.logprob for score in scores])
            _add(tallies[NORMALISED], item, logprobs / sizes, scores)
            _add(tallies[RAW], item, logprobs, scores)
        return {name: tally.result for name, tally in tallies.items()}


def _pair(tokenizer: LoadedTokenizer, option: Option, *, chat: bool) -> Pair:
    if chat:
        return chat_pair(tokenizer, option.context, option.text)
    space = "" if option.context[-1:].isspace() or option.text[:1].isspace() or not option.context else " "
    return plain_pair(tokenizer, option.context, space + option.text)


def _require_fit(subject: Subject, pairs: Sequence[Pair]) -> None:
    if any(not len(pair.continuation) for pair in pairs):
        raise CannotAskError(EMPTY)
    if not all(fits(subject, pair) for pair in pairs):
        raise CannotAskError(TOO_LONG)


def _add(tally: Tally, item: ChoiceItem, scores: np.ndarray, found: Sequence[Likelihood]) -> None:
    """1 for a right answer; options that share the first place share the 1."""
    if not np.isfinite(scores).all():
        tally.skip("not_finite")
        return
    first = np.flatnonzero(scores == scores.max())
    value = len(set(first.tolist()) & set(item.gold)) / len(first)
    tally.add(item.id, value, cluster=item.cluster, tokens=sum(one.tokens for one in found))


def choice_suites(name: str, items: Items, *, chat: bool, beat: Callable[[], None] = silent) -> list[Facet]:
    """The suite by bytes, and the raw one."""
    found = tuple(item for item in items.items if isinstance(item, ChoiceItem))
    chance = float(np.mean([len(item.gold) / len(item.options) for item in found]))
    told = [asdict(item) for item in found]
    whole = ChoicePass(found, chat, beat)
    shared = Shared(whole)
    facets = [
        Facet(
            name=f"{name}-raw" if facet == RAW else name,
            metric="accuracy",
            better="higher",
            chance=chance,
            digest=digest_of("choices", facet, chat, told),
            items=len(found),
            facet=facet,
            shared=shared,
            bad=items.bad,
        )
        for facet in (NORMALISED, RAW)
    ]
    return in_shards(facets, whole)
