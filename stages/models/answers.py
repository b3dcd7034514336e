"""Answers of a model to many prompts: batches, and random numbers for each response.

Rollouts, evaluation and `respond` all ask here. Who computes is a `Backend`: a model in this process, or the policy
that an engine trains. A server that samples by itself would be a third: `Draws` says enough to make a seed for each
response.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import nn

from stages.models.generation import Draws, Sampling, generate
from stages.models.precision import autocast

BATCH_SIZE = 64
"""Responses that are generated at once, in rollouts too."""


class Backend(Protocol):
    """Whatever can continue a batch of prompts."""

    def respond(self, prompts: Sequence[np.ndarray], sampling: Sampling, draws: Draws) -> list[np.ndarray]:
        """Return one response per prompt, in order, the end token included where it was reached."""
        ...


@dataclass(frozen=True)
class InProcess:
    """A model of this process, by default in the precision that its device computes fastest."""

    model: nn.Module
    device: torch.device
    precision: str = "bf16"
    """`fp32` for the precision of the weights, where responses are to be those of other tools."""

    def respond(self, prompts: Sequence[np.ndarray], sampling: Sampling, draws: Draws) -> list[np.ndarray]:
        with autocast(self.device, self.precision):
            return generate(self.model, prompts, sampling, draws)


@dataclass(frozen=True)
class Answerer:
    """Samples with fixed settings. A response depends on (seed, stream, its number), not on how prompts are batched."""

    backend: Backend
    sampling: Sampling
    seed: int
    stream: int = 0
    """Keeps apart what shares a seed."""
    batch_size: int = BATCH_SIZE
    """Responses generated at once. Another size may round logits differently, and so change a rare token."""

    def answers(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return one response per prompt, in order; prompt i has number i."""
        return list(chain.from_iterable(self.in_batches(prompts)))

    def in_batches(self, prompts: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """As `answers`, batch by batch, for callers that report progress."""
        for start in range(0, len(prompts), self.batch_size):
            part = prompts[start : start + self.batch_size]
            yield self.batch(part, numbers=range(start, start + len(part)))

    def batch(self, prompts: Sequence[np.ndarray], *, numbers: Sequence[int]) -> list[np.ndarray]:
        """Answer one batch with numbers of the caller's choice: a rank of several has only some of all prompts."""
        return self.backend.respond(prompts, self.sampling, Draws(self.seed, self.stream, numbers))
