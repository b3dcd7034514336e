"""The role that pretraining, SFT, reward, DPO and PPO play for the one training loop."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from stages.data.tokens.packing import Packed
from stages.train.engine import Engine, LossOutput


def _observe_nothing(counts: Tensor) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Step:
    """One optimizer step on this rank."""

    micro_batches: list[Packed]
    counted: bool = True
    """False on a rank that a small last step leaves without items: it joins the collectives and counts nothing."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers that belong to the step as a whole, already the same on every rank (a rollout's, say)."""
    is_last: bool = False
    """Whether the objective ends with this step, whatever `num_steps` says: it is evaluated and logged as the last."""
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    """Factors on the learning rate of single parts in this step, by their names."""
    observe: Callable[[Tensor], dict[str, float]] = _observe_nothing
    """Takes the counts of the whole step, before the next one is requested, and returns metrics of them."""


@dataclass(frozen=True)
class ObjectiveState:
    """What an objective must remember to continue exactly where it was."""

    numbers: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What the loop asks for. All that `loss` needs is in the batch, so that it is pure."""

    num_steps: int
    """Optimizer steps of the whole training, also those before a resume."""
    tokens_per_step: int
    """Laid-out tokens of every full step; 0 where steps differ in it."""
    num_heldout: int
    """Items that an evaluation measures; without any it measures nothing."""
    order: str
    """Digest of which items train in which step: a checkpoint is only valid for the same order."""

    @property
    def ledger(self) -> dict[str, Any]:
        """What the ledger must say of the steps that were made: an objective may end before `num_steps`."""
        ...

    def steps(self, engine: Engine) -> Iterator[Step]:
        """Yield the remaining steps; PPO rolls out in here, with the live policy."""
        ...

    def weight(self, batch: Packed) -> float:
        """Units (tokens, pairs) that the loss of this micro-batch sums over."""
        ...

    def loss(self, parts: nn.ModuleDict, batch: Packed) -> LossOutput: ...

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Measure on held-out data; the same numbers on every rank."""
        ...

    def state_dict(self) -> ObjectiveState: ...

    def load_state_dict(self, state: ObjectiveState) -> None: ...
