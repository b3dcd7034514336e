"""What models write to held-out prompts, without asking whether it is right: toxicity, length and repetition.

The three share the responses, which are sampled as those of the win rate are: the same numbers are drawn for every
model, so that differences come from the models.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.config.benchmarks import BuiltIn
from stages.config.closing import EvaluateConfig
from stages.data.curation.toxicity import toxicity_scorer
from stages.data.sources.records import utf8_size
from stages.judge.benchmarks.asking import TOO_LONG, CannotAskError, messages_prompt
from stages.judge.benchmarks.facets import Facet, Shared, Tally, digest_of
from stages.judge.benchmarks.heldout_rows import HeldoutConversation
from stages.judge.benchmarks.writing import Written, sample
from stages.judge.suite import Better, Measurement, Subject

_NGRAM = 4
"""Words of a group whose return counts as repetition (Welleck et al. 2019, https://arxiv.org/abs/1908.04319)."""

KINDS: dict[BuiltIn, tuple[str, Better]] = {
    BuiltIn.TOXICITY: ("toxicity", "lower"),
    BuiltIn.RESPONSE_LENGTH: ("bytes", ""),
    BuiltIn.REPETITION: ("repeated", "lower"),
}
"""Metric of each, and which way is better."""


@dataclass(frozen=True)
class ResponsePass:
    """One sampled response per prompt."""

    prompts: tuple[HeldoutConversation, ...]
    kinds: tuple[BuiltIn, ...]
    """Of the three those that are asked for: the classifier of toxicity takes seconds to import."""
    max_tokens: int
    temperature: float

    def run(self, subject: Subject) -> dict[str, Measurement]:
        tallies = {kind: Tally() for kind in self.kinds}
        asked: list[tuple[HeldoutConversation, np.ndarray]] = []
        for prompt in self.prompts:
            try:
                ids = messages_prompt(subject.tokenizer, prompt.prompt)
                if len(ids) + self.max_tokens > subject.context_length:
                    raise CannotAskError(TOO_LONG)
                asked.append((prompt, ids))
            except CannotAskError as reason:
                for tally in tallies.values():
                    tally.skip(str(reason))
        ids = [ids for _, ids in asked]
        responses = sample(subject, ids, max_tokens=self.max_tokens, temperature=self.temperature)
        for kind, tally in tallies.items():
            for (prompt, _), response, value in zip(asked, responses, _values(kind, responses), strict=True):
                tally.add(prompt.id, value, tokens=response.tokens, response=response.text)
        return {kind.value: tally.result for kind, tally in tallies.items()}


def _values(kind: BuiltIn, responses: Sequence[Written]) -> list[float]:
    texts = [response.text for response in responses]
    if kind is BuiltIn.TOXICITY:
        scorer = toxicity_scorer("classifier", ())
        assert scorer is not None
        return [float(score) for score in scorer.scores(texts)]
    return [float(utf8_size(text)) if kind is BuiltIn.RESPONSE_LENGTH else repeated_share(text) for text in texts]


def repeated_share(text: str) -> float:
    """Share of the groups of four words that have occurred before in the text; 0 for one that has no two groups."""
    words = text.split()
    groups = Counter(tuple(words[start : start + _NGRAM]) for start in range(len(words) - _NGRAM + 1))
    total = groups.total()
    return 1.0 - len(groups) / total if total else 0.0


def response_suites(
    wanted: Sequence[tuple[BuiltIn, str]], prompts: Sequence[HeldoutConversation], config: EvaluateConfig
) -> list[Facet]:
    """The suites that are asked for, by kind and name, over the same responses."""
    kinds = tuple(kind for kind, _ in wanted)
    made = ResponsePass(tuple(prompts), kinds, config.max_response_length, config.temperature)
    shared = Shared(made)
    told = [config.max_response_length, config.temperature, config.seed]
    asked = [[prompt.id, list(prompt.prompt)] for prompt in prompts]
    return [
        Facet(
            name=name,
            metric=KINDS[kind][0],
            better=KINDS[kind][1],
            chance=None,
            digest=digest_of("responses", kind, told, asked),
            items=len(prompts),
            facet=kind.value,
            shared=shared,
        )
        for kind, name in wanted
    ]
