"""Pipeline parallelism: consecutive layers on consecutive processes, through which the micro-batches of a step flow.

A stage's model keeps its names; layers of other stages let everything pass. A stage's input arrives where the
embeddings were, so the objective's loss function runs unchanged on the last stage. The schedule is one forward, one
backward with a flush at the step's end (Narayanan et al. 2021, arXiv:2104.04473). It is ours because torch's wants one
batch that it can cut into equal parts: our micro-batches are given, and every rank knows their shapes.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stages.config.errors import ConfigError
from stages.models.attention import attends_within_documents
from stages.train.engine import LossOutput, Share
from stages.train.ranks import Axis


class _Passing(nn.Module):
    """Stands where another stage has a decoder layer."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class _Received(nn.Module):
    """Stands where the first stage has the embeddings: gives what came from the stage before."""

    hidden: Tensor

    def __init__(self, weight: nn.Parameter | None) -> None:
        """`weight` is the output layer's, on a last stage that shares it with the embeddings."""
        super().__init__()
        self.weight = weight

    def forward(self, _: Tensor) -> Tensor:
        return self.hidden


def check_stackable(model: Any, size: int) -> None:
    """Raise ConfigError when a model's layers cannot be dealt to `size` stages; its weights are not looked at."""
    trunk = model.base_model
    layers, norm = getattr(trunk, "layers", None), getattr(trunk, "norm", None)
    if not isinstance(layers, nn.ModuleList) or norm is None:
        raise ConfigError(
            f"pipeline_parallel={size}: {type(model).__name__} is not a stack of `layers` with a last `norm`",
            advice="Use engine=fsdp or engine=deepspeed with pipeline_parallel=1 for this architecture.",
        )
    if not attends_within_documents(model):
        raise ConfigError(
            f"pipeline_parallel={size}: {type(model).__name__} has an attention of its own (windows, caps), "
            "which gets padded rows, and those do not pass between stages",
            advice="Use engine=fsdp or engine=deepspeed with pipeline_parallel=1 for this architecture.",
        )
    if len(layers) < size:
        raise ConfigError(
            f"pipeline_parallel={size} is more than the model's {len(layers)} layers",
            advice=f"Use at most {len(layers)}.",
        )


def keep_stage(model: Any, axis: Axis) -> str | None:
    """Leave this stage's layers in the model; return the name of the weight that first and last stage share, on them.

    Raises ConfigError when the model cannot be cut into that many stages.
    """
    check_stackable(model, axis.size)
    trunk = model.base_model
    layers = trunk.layers
    first, stop = (len(layers) * stage // axis.size for stage in (axis.rank, axis.rank + 1))
    for index in range(len(layers)):
        if not first <= index < stop:
            layers[index] = _Passing()
    weight = model.get_input_embeddings().weight
    tied = weight is model.get_output_embeddings().weight
    if axis.rank > 0:
        model.set_input_embeddings(_Received(weight if tied and axis.is_last else None))
    if not axis.is_last:
        trunk.norm = nn.Identity()
        model.set_output_embeddings(nn.Identity())
    return next((name for name, own in model.named_parameters() if own is weight), None) if tied else None


def set_received(model: Any, hidden: Tensor | None) -> None:
    if hidden is not None:
        model.get_input_embeddings().hidden = hidden


class Schedule:
    """Moves hidden states forward and gradients back between the stages.

    Four micro-batches (F forward, B backward) on three stages, time from left to right:

        stage 0   F1 F2 F3 .  .  B1 F4 B2 .  B3 .  B4
        stage 1   .  F1 F2 .  B1 F3 B2 F4 B3 .  B4 .
        stage 2   .  .  F1 B1 F2 B2 F3 B3 F4 B4 .  .

    A stage runs as many forwards ahead as there are stages after it, then alternates, then drains. So it holds the
    activations of at most that many micro-batches and one more, instead of all, which running all forwards first would.
    """

    def __init__(self, axis: Axis, *, hidden_size: int) -> None:
        self._axis, self._hidden_size = axis, hidden_size

    def run(
        self,
        shares: Sequence[Share],
        *,
        forward: Callable[[Share, Tensor | None], Tensor | LossOutput],
        backward: Callable[[Share, Tensor | LossOutput, Tensor | None], None],
    ) -> list[LossOutput]:
        """Run all shares forward and backward through this stage; returns the outputs on the last stage.

        `forward(share, received)` gives the hidden states or, on the last stage, the loss;
        `backward(share, output, gradient of the output)` fills in gradients.
        """
        # Forwards whose backward has not come: first in, first out, because gradients return in the order of forwards.
        running: deque[tuple[Share, Tensor | None, Tensor | LossOutput]] = deque()
        outputs: list[LossOutput] = []

        def start(share: Share, received: Tensor | None) -> Tensor | LossOutput:
            output = forward(share, received)
            running.append((share, received, output))
            if isinstance(output, LossOutput):
                outputs.append(output)
            return output

        def finish(gradient: Tensor | None) -> Tensor | None:
            share, received, output = running.popleft()
            backward(share, output, gradient)
            # `received` is a leaf of this stage's graph; its gradient is what the stage before needs.
            return None if received is None else received.grad

        # Warm-up: F1 F2 of stage 0. With fewer micro-batches than stages, all forwards come first.
        ahead = min(self._axis.size - self._axis.rank - 1, len(shares))
        for share in shares[:ahead]:
            self._exchange(give_next=start(share, self._exchange(take_previous=share)))
        # Alternating: send F(n), receive the gradient of the oldest; send that one's B, receive the input of F(n + 1).
        # Each `_exchange` sends and receives at once: of two neighbours that only send, each would wait for the other.
        rest = shares[ahead:]
        received = self._exchange(take_previous=rest[0]) if rest else None
        for share, following in zip(rest, [*rest[1:], None], strict=True):
            gradient = self._exchange(give_next=start(share, received), take_next=running[0][0])
            received = self._exchange(give_previous=finish(gradient), take_previous=following)
        # Draining: the backwards of the warm-up.
        for _ in range(ahead):
            self._exchange(give_previous=finish(self._exchange(take_next=running[0][0])))
        return outputs

    def infer(
        self, share: Share, *, forward: Callable[[Share, Tensor | None], Tensor | LossOutput]
    ) -> Tensor | LossOutput:
        """Run one share forward through this stage and return its output."""
        output = forward(share, self._exchange(take_previous=share))
        self._exchange(give_next=output)
        return output

    def swap_with_other_end(self, mine: Tensor) -> Tensor:
        """Return what the last stage gave to the first, and the other way round."""
        theirs = torch.empty_like(mine)
        other = self._axis.size - 1 - self._axis.rank
        self._wait([self._operation(dist.isend, mine, other), self._operation(dist.irecv, theirs, other)])
        return theirs

    def _exchange(
        self,
        *,
        give_next: Tensor | LossOutput | None = None,
        give_previous: Tensor | None = None,
        take_next: Share | None = None,
        take_previous: Share | None = None,
    ) -> Tensor | None:
        """Send and receive at once, so that no two stages wait for each other; the ends have no neighbour."""
        before, after = self._axis.rank - 1, self._axis.rank + 1
        operations: list[dist.P2POp] = []
        taken: Tensor | None = None
        if isinstance(give_next, Tensor) and not self._axis.is_last:
            operations.append(self._operation(dist.isend, give_next.detach().contiguous(), after))
        if give_previous is not None:
            operations.append(self._operation(dist.isend, give_previous.contiguous(), before))
        if take_next is not None and not self._axis.is_last:
            taken = self._empty(take_next)
            operations.append(self._operation(dist.irecv, taken, after))
        if take_previous is not None and self._axis.rank > 0:
            taken = self._empty(take_previous)
            operations.append(self._operation(dist.irecv, taken, before))
        self._wait(operations)
        # Not in evaluations, where the stage keeps no graph.
        if taken is not None and take_previous is not None:
            taken.requires_grad_(torch.is_grad_enabled())
        return taken

    def _empty(self, share: Share) -> Tensor:
        # Shapes are not sent: every rank has all micro-batches. In float32, as the residual stream is.
        return torch.empty(*share.batch.input_ids_BT.shape, self._hidden_size, device=self._axis.device)

    def _operation(self, kind: Callable[..., Any], tensor: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, self._axis.peer(rank), self._axis.group)

    @staticmethod
    def _wait(operations: list[dist.P2POp]) -> None:
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
