"""One answer that is being written: what was asked, what has come so far, and why it ended."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from stages.models.generation import Draws
from stages.serve.text import StopTexts, TextStream

_STREAM = 2
"""Random stream; `evaluate` has 0 and `respond` 1."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Choice:
    """How the tokens of an answer are chosen."""

    max_tokens: int
    """At most so many, an end token included; 0 only looks at the prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Only of the most probable tokens that together have this probability."""
    stops: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it."""
    end_ids: frozenset[int] = frozenset()
    """Tokens that end the answer and are no part of its text."""
    seed: int | None = None
    """The same seed gives the same answer; None is a new one each time."""
    top_logprobs: int | None = None
    """Of so many tokens at each place; None is of none, 0 of the chosen one alone."""
    echo: bool = False
    """Whether the logprobs of the prompt's tokens are wanted too."""


@dataclass(frozen=True)
class TokenScore:
    """One token with its log-probability at temperature 1, and the most probable ones at its place."""

    token: int
    logprob: float | None
    """None for the first token of a prompt, which nothing precedes."""
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step added to an answer."""

    text: str = ""
    scores: tuple[TokenScore, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""
    """Set when the model failed; there is no more after it."""

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or bool(self.error)


@dataclass
class Answer:
    """An answer to one prompt."""

    prompt: np.ndarray
    choice: Choice
    emit: Callable[[Piece], None]
    """Called by the thread that computes, once for each piece."""
    tokenizer: Tokenizer
    number: int = 0
    """Of several answers to one prompt; each draws its own random numbers."""
    num_tokens: int = 0
    """Written so far, an end token included."""
    prompt_scores: list[TokenScore] = field(default_factory=list)
    cancelled: bool = False
    """Set by whoever asked, when the answer is no longer wanted."""

    def __post_init__(self) -> None:
        seed = secrets.randbits(62) if self.choice.seed is None else self.choice.seed % (1 << 63)
        self._draws = Draws(seed, _STREAM, [self.number]).uniforms(max(1, self.choice.max_tokens))[0]
        self._text = TextStream(self.tokenizer)
        self._stops = StopTexts(self.choice.stops)
        self._scores: list[TokenScore] = []
        self.is_done = False

    @property
    def draw(self) -> float:
        """The random number that chooses the next token."""
        return float(self._draws[self.num_tokens])

    def add(self, score: TokenScore) -> None:
        """Take the next token; emits the text that it completes, and ends the answer where it ends."""
        self.num_tokens += 1
        if score.token in self.choice.end_ids:
            self._end("stop", self._stops.push(self._text.finish()))
            return
        if self.choice.top_logprobs is not None:
            self._scores.append(score)
        text = self._stops.push(self._text.push(score.token))
        if self._stops.found:
            self._end("stop", text)
        elif self.num_tokens >= self.choice.max_tokens:
            self._end("length", text + self._stops.push(self._text.finish()))
        elif text:
            self.emit(Piece(text, self._take_scores()))

    def end_with_prompt(self) -> None:
        """End an answer of no tokens, of which only the prompt's scores were wanted."""
        self._end("length", "")

    def fail(self, error: str) -> None:
        if not self.is_done:
            self.is_done = True
            self.emit(Piece(error=error))

    def _end(self, reason: FinishReason, text: str) -> None:
        # What comes out at the end may complete a text that stops, or be part of none.
        text += self._stops.finish()
        self.is_done = True
        self.emit(Piece(text, self._take_scores(), "stop" if self._stops.found else reason))

    def _take_scores(self) -> tuple[TokenScore, ...]:
        taken, self._scores = tuple(self._scores), []
        return taken


def all_done(sequences: Sequence[Answer]) -> bool:
    return all(sequence.is_done or sequence.cancelled for sequence in sequences)
