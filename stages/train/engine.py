"""What loop and objectives need from an engine, however it spreads parameters, gradients and work over processes.

Whatever uses parameters runs inside the forward of one root module (`Trainable`), so that the wrappers' hooks see it:
losses, rollouts and evaluations are functions given to the engine. Only `engines.choose` knows which engines there are.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from stages.data.tokens.packing import Packed
from stages.train.ranks import Processes
from stages.train.shards import Piece, SavedState

Result = TypeVar("Result")
Item = TypeVar("Item")

NO_FACTORS: Mapping[str, float] = MappingProxyType({})


class Trainable(nn.Module):
    """The root that engines wrap: named models, and a forward that runs any function of them."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, compute: Callable[..., Result], *arguments: Any) -> Result:
        return compute(self.parts, *arguments)


class LossOutput(NamedTuple):
    """A loss summed over units (never averaged), and metrics as pairs (sum, weight) of shape (2,)."""

    loss_sum: Tensor
    metrics: dict[str, Tensor]
    token_loss_sum: Tensor | None = None
    """A second loss, summed over all tokens but padding and averaged over those of the whole step."""
    counts: Tensor | None = None
    """What the step counts, of any shape: summed over micro-batches and ranks, then given to `Step.observe`."""


class Share(NamedTuple):
    """A micro-batch, and the factors that make its summed losses shares of the step's loss; 0 for one that only keeps
    other ranks company."""

    batch: Packed
    scale: float
    token_scale: float = 0.0

    def of(self, output: LossOutput) -> Tensor:
        """What the micro-batch adds to the loss of the whole step."""
        loss = output.loss_sum * self.scale
        return loss if output.token_loss_sum is None else loss + output.token_loss_sum * self.token_scale


class StepReport(NamedTuple):
    """What an optimizer step did."""

    grad_norm: float
    """Before clipping."""
    skipped: bool
    """True when the step was not accepted and the parameters were left alone."""


class Held(NamedTuple):
    """The tensors that this process holds for a training; those of one kind may share storage."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    """Empty but between a backward pass and its step."""
    optimizer: list[Tensor]
    frozen: list[Tensor]
    """Of models that are only read."""


class Engine(Protocol):
    """Owns the trained parameters, their optimizer, the device and the collectives."""

    device: torch.device
    rank: int
    """Which share of every step's items this process trains on."""
    world_size: int
    """Number of shares that the items of a step are divided into."""
    is_main: bool
    """True on the one process that reports numbers and publishes files."""
    processes: Processes
    """All processes of the training, also those that compute one share together."""

    def infer(self, compute: Callable[..., Result], *arguments: Any) -> Result:
        """Run `compute(parts, *arguments)` in the root's forward without gradients or dropout, in the run's precision,
        batches on the device."""
        ...

    def seed(self, seed: int, step: int) -> None:
        """Make what the models draw in a step (dropout) follow from (seed, step, rank), so that it is the same after a
        resume."""
        ...

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the weights are those that are evaluated and exported: their moving average where there is one."""
        ...

    def freeze(self, model: nn.Module) -> nn.Module:
        """Move a model that is only read (reference, reward) to the device and take its gradients away."""
        ...

    def backward(self, loss: Callable[..., LossOutput], shares: Sequence[Share]) -> list[LossOutput]:
        """Run `loss(parts, batch)` forward and backward for every share and sum the scaled gradients over ranks; all
        ranks give equally many. Returns the outputs, detached."""
        ...

    def step(
        self,
        learning_rate: float,
        *,
        accepts: Callable[[float], bool] = math.isfinite,
        rate_factors: Mapping[str, float] = NO_FACTORS,
    ) -> StepReport:
        """Clip, update and clear; a step whose gradient norm `accepts` refuses changes nothing. `rate_factors` multiply
        the learning rate of the parts that they name; a part with factor 0 stays as it is."""
        ...

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sum each number over ranks, in float64."""
        ...

    def max(self, value: float) -> float:
        """Return the largest of all ranks' values."""
        ...

    def gather(self, items: list[Item]) -> list[Item]:
        """Concatenate every rank's items, small ones, in the order of ranks."""
        ...

    def all_done(self, done: bool) -> bool:
        """Agree on the end of a generation; only models in shards need to."""
        ...

    def model_weights(self, part: str) -> dict[str, Tensor]:
        """Return one part's full weights for export, on the CPU; every process must call it, the main one gets them."""
        ...

    def held(self) -> Held:
        """Return what this process holds now, without copies."""
        ...

    def state_dict(self) -> dict[str, Piece]:
        """Return copies, on the CPU, of the pieces of trained parameters and optimizer state for which this process
        answers; those of all processes tile the tensors."""
        ...

    def load_state_dict(self, state: SavedState) -> None:
        """Restore what any engine's `state_dict` returned, on any number of processes."""
        ...
