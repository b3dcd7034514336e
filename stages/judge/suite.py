"""What judges agree on: a suite has items, a model gets one score for each of them, and every score is kept.

A suite measures one model at a time and knows nothing of the others. Models are compared afterwards, item by item, so
two models that were measured at different times compare as well as two of one run.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import nn

from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.models.answers import Answerer

Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Subject:
    """One model that is measured, with its own tokenizer: an earlier champion may have another one than the run."""

    role: str
    """Under which its scores are kept: `base`, `sft`, `ppo`, `dpo`, `champion`, ..."""
    identity: str
    """Digest of the model's content: equal models are measured once."""
    model: nn.Module
    tokenizer: LoadedTokenizer
    device: torch.device
    context_length: int
    """Most tokens that the model reads and writes together."""
    answerer: Callable[[int, float], Answerer]
    """Makes what generates, for at most so many tokens at this temperature."""


@dataclass(frozen=True)
class Score:
    """What one model got for one item."""

    item: str
    """Id of the item, unique in its suite."""
    value: float
    """Finite; an item without such a value is skipped with a reason."""
    cluster: str = ""
    """What items share whose scores depend on each other, such as their prompt; empty: the item is its own."""
    tokens: int = 0
    """Tokens that the value covers, those of a response or of the text; 0 where it covers none."""
    response: str = ""
    """What the model wrote, for suites that let it write."""


@dataclass
class Measurement:
    """The scores of one model on one suite."""

    scores: list[Score] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Items that this model could not be measured on, by reason."""
    is_final: bool = True
    """False where another evaluation may measure more, such as when a judge that is a server comes back; then no other
    evaluation uses this one."""


class Suite(Protocol):
    """Items, and how a model is measured on them."""

    @property
    def name(self) -> str:
        """Of the suite in metric keys (`suite/<name>/<metric>`), tables and scores.parquet."""
        ...

    @property
    def metric(self) -> str:
        """What the mean of the values is, such as `accuracy`, `exact_match` or `bits_per_byte`."""
        ...

    @property
    def better(self) -> Better:
        """Which way is better; empty for distances and lengths, which are neither."""
        ...

    @property
    def chance(self) -> float | None:
        """Mean value of a model that knows nothing, where there is such a number."""
        ...

    @property
    def digest(self) -> str:
        """Hash over the items and all settings that decide a value; the same model is not measured twice under it."""
        ...

    def __len__(self) -> int:
        """Number of items."""
        ...

    def measure(self, subject: Subject) -> Measurement:
        """Return a score or a reason for every item; never NaN, never an exception over one item."""
        ...
