"""Items that are answered in writing and judged by a rule, such as GSM8K: the greedy response, and 1 if it is right."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from stages.config.benchmarks import LONGEST_RESPONSE, Benchmark, Rule
from stages.judge.benchmarks.asking import CannotAskError, chat_prompt, plain_prompt
from stages.judge.benchmarks.facets import Facet, Shared, Tally, digest_of, in_shards, silent
from stages.judge.benchmarks.items import AnswerItem, Items
from stages.judge.benchmarks.rules import Judgement, rule_of
from stages.judge.benchmarks.writing import write
from stages.judge.heldout import TOO_LONG
from stages.judge.suite import Measurement, Subject
from stages.rules.failed import RuleFailedError

_ASKED = "Question: {question}\nAnswer:"
_NEXT_QUESTION, _LINE_END = "\nQuestion:", "\n"
_FACET = "answers"


@dataclass(frozen=True)
class AnswerPass:
    """Every question, answered once."""

    items: tuple[AnswerItem, ...]
    rule: Judgement
    chat: bool
    max_tokens: int
    stop: str
    beat: Callable[[], None] = silent

    def run(self, subject: Subject) -> dict[str, Measurement]:
        tally = Tally()
        asked: list[tuple[AnswerItem, np.ndarray]] = []
        for item in self.items:
            try:
                asked.append((item, self._prompt(subject, item)))
            except CannotAskError as reason:
                tally.skip(str(reason))
        stops = (self.stop,) if self.stop else ()
        responses = write(
            subject, [prompt for _, prompt in asked], max_tokens=self.max_tokens, stops=stops, beat=self.beat
        )
        for (item, _), response in zip(asked, responses, strict=True):
            self.beat()  # a function of others may take seconds for each
            try:
                value = self.rule.value(response.text, item.answers)
            except RuleFailedError as reason:
                tally.skip(str(reason))
                continue
            tally.add(item.id, value, cluster=item.cluster, tokens=response.tokens, response=response.text)
        return {_FACET: tally.result}

    def _prompt(self, subject: Subject, item: AnswerItem) -> np.ndarray:
        if self.chat:
            prompt = chat_prompt(subject.tokenizer, item.question)
        else:
            prompt = plain_prompt(subject.tokenizer, _ASKED.format(question=item.question))
        if len(prompt) + self.max_tokens > subject.context_length:
            raise CannotAskError(TOO_LONG)
        return prompt


def answer_suites(name: str, items: Items, benchmark: Benchmark, *, beat: Callable[[], None] = silent) -> list[Facet]:
    """One suite, whose metric is the rule's."""
    found = tuple(item for item in items.items if isinstance(item, AnswerItem))
    rule = rule_of(benchmark)
    short = benchmark.rule in (None, Rule.EXACT)
    usual = "" if benchmark.chat else _LINE_END if short else _NEXT_QUESTION
    stop, max_tokens = benchmark.stop or usual, benchmark.max_tokens or LONGEST_RESPONSE
    # A base model writes on after its answer: without a chat, what follows the line is not part of it.
    told = [rule.identity, benchmark.chat, max_tokens, stop, [asdict(item) for item in found]]
    whole = AnswerPass(found, rule, benchmark.chat, max_tokens, stop, beat)
    facets = [
        Facet(
            name=name,
            metric=rule.metric,
            better="higher",
            chance=None,
            digest=digest_of("answers", *told),
            items=len(found),
            facet=_FACET,
            shared=Shared(whole),
            bad=items.bad,
        )
    ]
    return in_shards(facets, whole)
