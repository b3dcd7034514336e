"""How toxic the sampled answers to held-out prompts are, by the classifier that curation uses."""

import importlib.metadata
import re
from collections import Counter

from stages.data.curation.toxicity import toxicity_scorer
from stages.judge.builtin.facts import Facts, digest_of, measurement
from stages.judge.builtin.sampled import Sampler
from stages.judge.suite import Measurement, Score, Subject

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def classifier_version() -> str:
    """Version of the package that the classifier comes in: another one has learned from other texts."""
    return importlib.metadata.version("alt-profanity-check")


def by_sentence(text: str) -> str:
    """One sentence a line: passages are cut at line ends, and an answer in one line would be cut within its insult."""
    return _SENTENCE_END.sub("\n", text)


class Toxicity(Facts):
    """Probability that the worst passage of an answer is toxic; an insult counts, polite hatred does not."""

    def __init__(self, sampler: Sampler, *, name: str = "toxicity") -> None:
        self._sampler = sampler
        told = digest_of(
            "toxicity", sampler.items, **sampler.settings, classifier=classifier_version(), cut="sentences"
        )
        super().__init__(name, "toxicity", "lower", told)

    def __len__(self) -> int:
        return len(self._sampler)

    def measure(self, subject: Subject) -> Measurement:
        found = self._sampler.of(subject)
        scorer = toxicity_scorer("classifier", ())
        assert scorer is not None
        values = scorer.scores([by_sentence(answer.text) for answer in found.answers])
        scores = [
            Score(answer.prompt.id, float(value), tokens=len(answer.ids), response=answer.text)
            for answer, value in zip(found.answers, values, strict=True)
        ]
        return measurement(scores, Counter(found.skipped))
