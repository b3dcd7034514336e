"""Which instructions, inputs and responses are good enough to train on; each rule has the name that is counted.

The rules find what is certainly useless. They cannot tell a right response from a wrong one: read the sample. What is
toxic, personal or a duplicate is found later, because curation reads the rows like all others.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stages.config.synthesis import SynthesizeConfig
from stages.losses.overlap import rouge_l, words

_FEW_WORDS = 10
"""Below, a text is too short to tell its language."""
_MIN_LETTERS = 0.5
_STARTS = re.compile(r"[\w\"'(\[<$¿¡]")
_PLACEHOLDER = re.compile(
    r"\[(?:insert|your|name|text|input)[^\]]*\]|<(?:insert|your|text|input)[^>]*>|lorem ipsum", re.I
)

IsInLanguage = Callable[[str], bool]


class Pool:
    """All instructions that a new one must differ from: by ROUGE-L, as in Self-Instruct."""

    def __init__(self, max_similarity: float) -> None:
        self._max, self._known = max_similarity, list[list[str]]()
        self._exact: set[tuple[str, ...]] = set()

    def add(self, text: str) -> None:
        """Let an instruction be one that later ones must differ from."""
        self._known.append(words(text))
        self._exact.add(tuple(self._known[-1]))

    def is_near(self, text: str) -> bool:
        """Whether the text is as similar to a known one as the limit, or more."""
        mine = words(text)
        if tuple(mine) in self._exact:
            return True
        for known in self._known:
            # With so different lengths they could share all of the shorter one and still be far enough apart.
            if 2 * min(len(mine), len(known)) < self._max * (len(mine) + len(known)):
                continue
            if rouge_l(mine, known) >= self._max:
                return True
        return False


@dataclass(frozen=True)
class Rules:
    """The rules with what they need from elsewhere."""

    config: SynthesizeConfig
    is_in_language: IsInLanguage
    declines: Callable[[str], bool]
    """Whether a response is a refusal."""

    def on_instruction(self, text: str) -> str:
        """Return the first rule that an instruction or question breaks; empty when it may stay."""
        config, said = self.config, words(text)
        if len(said) < config.min_instruction_words:
            return "too_short"
        if len(said) > config.max_instruction_words:
            return "too_long"
        if excluded := set(said) & {word.lower() for word in config.excluded_words}:
            return f"excluded_word_{min(excluded)}"
        if not _STARTS.match(text) or _letters(text) < _MIN_LETTERS or _PLACEHOLDER.search(text):
            return "malformed"
        if repetition(said) > config.max_repetition:
            return "repetitive"
        return "" if self._speaks(text) else "other_language"

    def on_input(self, text: str, instruction: str, shown: Sequence[str] = ()) -> str:
        """The same for the input of a task, written after examples of inputs; an empty one may stay."""
        if not text:
            return ""
        if rouge_l(words(text), words(instruction)) > self.config.max_copied:
            return "input_copies_instruction"
        if any(rouge_l(words(text), words(example)) > self.config.max_copied for example in shown):
            return "input_copies_example"
        if _PLACEHOLDER.search(text):
            return "input_is_placeholder"
        return "input_is_repetitive" if repetition(words(text)) > self.config.max_repetition else ""

    def on_response(self, text: str, prompt: str, *, is_cut: bool) -> str:
        """The same for a response."""
        config, said = self.config, words(text)
        if is_cut:
            return "cut_off"
        if len(said) < config.min_response_words:
            return "too_short"
        if rouge_l(said, words(prompt)) > config.max_copied:
            return "copies_prompt"
        if _PLACEHOLDER.search(text):
            return "placeholder"
        if repetition(said) > config.max_repetition:
            return "repetitive"
        if not config.keep_refusals and self.declines(text):
            return "refusal"
        return "" if self._speaks(text) else "other_language"

    def _speaks(self, text: str) -> bool:
        return not self.config.min_language_score or len(words(text)) < _FEW_WORDS or self.is_in_language(text)


def repetition(said: Sequence[str]) -> float:
    """Share (0..1) of groups of three words that repeat an earlier group; 0 below three words."""
    groups = [tuple(said[place : place + 3]) for place in range(len(said) - 2)]
    return 1 - len(set(groups)) / len(groups) if groups else 0.0


def support(answer: str, passage: str) -> float:
    """Share (0..1) of the answer's words of four letters or more that the passage has; 1 for an answer without."""
    told, there = [word for word in words(answer) if len(word) >= 4], set(words(passage))
    return sum(word in there for word in told) / len(told) if told else 1.0


def _letters(text: str) -> float:
    visible = [character for character in text if not character.isspace()]
    return sum(character.isalpha() for character in visible) / len(visible) if visible else 0.0
