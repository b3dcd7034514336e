"""Two ways to score how toxic texts are: a linear classifier that ships in a wheel, or a word list.

Both find insults and obscenity; neither finds polite hatred. Long texts are scored by their worst passage, because an
average over a long page would hide one insult.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

from stages.config.errors import ConfigError

# Measured on docs: at 200 characters one insult in 20 kB scores 0.999 and no real document reaches 0.8; at 600 it
# scores 0.26 and is missed.
PASSAGE_CHARACTERS = 200


class ToxicityScorer(Protocol):
    """Scores texts from 0 (harmless) to 1 (toxic)."""

    def scores(self, texts: Sequence[str]) -> list[float]: ...


def passages(text: str) -> list[str]:
    """Cut a text at line ends into passages of about 200 characters; each character is in exactly one."""
    cuts: list[str] = []
    current: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), PASSAGE_CHARACTERS):
            piece = line[start : start + PASSAGE_CHARACTERS]
            if length + len(piece) > PASSAGE_CHARACTERS and current:
                cuts.append("".join(current))
                current, length = [], 0
            current.append(piece)
            length += len(piece)
    if current:
        cuts.append("".join(current))
    return cuts


class ClassifierScorer:
    """alt-profanity-check: a linear SVM over word counts, inside its wheel (no download, about 1 MB)."""

    def __init__(self) -> None:
        # The wheel's model is a joblib file, which can run code; it comes from the locked package, never from storage.
        from profanity_check import predict_prob

        self._predict = predict_prob

    def scores(self, texts: Sequence[str]) -> list[float]:
        """The worst passage's probability for each text."""
        cuts = [passages(text) for text in texts]
        flat = [passage for cut in cuts for passage in cut]
        if not flat:
            return [0.0 for _ in texts]
        probabilities = iter(self._predict(flat).tolist())
        return [max((next(probabilities) for _ in cut), default=0.0) for cut in cuts]


class WordListScorer:
    """Counts whole-word hits; n hits score 1 - 0.5^n."""

    def __init__(self, words: Iterable[str]) -> None:
        cleaned = sorted({word.strip().lower() for word in words} - {""})
        if not cleaned:
            raise ConfigError(
                "toxicity_word_list holds no word",
                advice="Give one word or phrase a line, or use toxicity='classifier'.",
            )
        self._pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, cleaned)) + r")\b", re.IGNORECASE)

    def scores(self, texts: Sequence[str]) -> list[float]:
        """One score for each text."""
        return [1.0 - 0.5 ** len(self._pattern.findall(text)) for text in texts]


@lru_cache(maxsize=1)
def toxicity_scorer(kind: str, words: tuple[str, ...]) -> ToxicityScorer | None:
    """One scorer per process, because the classifier takes seconds to import; None for toxicity=`none`."""
    match kind:
        case "classifier":
            return ClassifierScorer()
        case "word-list":
            return WordListScorer(words)
        case _:
            return None
