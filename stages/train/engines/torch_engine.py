"""PyTorch's own engines: one process, DDP (every rank holds the model) or FSDP2 (every rank holds a shard), on any grid
with tensor and pipeline parallelism."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stages.config.errors import ConfigError
from stages.config.execution import Engine as EngineKind
from stages.config.execution import ExecutionConfig
from stages.config.train import Algorithm, TrainConfig
from stages.data.tokens.packing import Packed
from stages.job.devices import local_device
from stages.models.experts import routing_of
from stages.models.forward import hidden_states
from stages.models.lora import has_adapter
from stages.models.precision import autocast, compute_dtype
from stages.train.averaging import averaged, update_average
from stages.train.engine import NO_FACTORS, Held, LossOutput, Share, StepReport, Trainable
from stages.train.engines.local import (
    check_precision,
    detached,
    evaluating,
    held_by,
    make_deterministic,
    moved,
    part_of,
    persistent_buffers,
    prepare,
    seed_models,
)
from stages.train.engines.pipeline import Schedule, keep_stage, set_received
from stages.train.engines.tensor_parallel import Slice, cut_layers
from stages.train.loss_scale import LossScale
from stages.train.optimizer import make_optimizer
from stages.train.ranks import Grid
from stages.train.shards import Box, Piece, SavedState, scalar, whole_tensors

Result = TypeVar("Result")
Item = TypeVar("Item")

_LOSS_SCALE = "loss_scale"


class TorchEngine:
    """See `stages.train.engine.Engine`."""

    def __init__(self, parts: dict[str, nn.Module], config: TrainConfig, execution: ExecutionConfig) -> None:
        self.device = local_device()
        check_precision(config.precision, self.device)
        self.grid = Grid(self.device, tensor=execution.tensor_parallel, pipeline=execution.pipeline_parallel)
        self.processes, self.is_main = self.grid.processes, self.grid.is_main
        self.rank, self.world_size = self.grid.data.rank, self.grid.data.size
        if self.device.type == "cpu":
            make_deterministic()
        refuse_what_cannot_be_cut(parts, config, execution)
        self._config, self._execution = config, execution
        self._loss_scale = LossScale(dynamic=config.precision == "fp16")
        self._slices: dict[str, Slice] = {}
        self._summed: set[str] = set()
        self._tied: set[str] = set()
        self._frozen: list[nn.Module] = []
        # The order matters: cut, move to the device, prepare (compile, checkpointing), wrap. The optimizer comes last,
        # because FSDP puts parameters of its own in place of the model's.
        for name, model in parts.items():
            self._cut(f"parts.{name}.", model)
        self._schedule = self._make_schedule(parts)
        self.trainable = Trainable(**parts).to(self.device)
        for model in parts.values():
            prepare(model, execution)
        self._module, self._sharded = self._wrap()
        dtype = compute_dtype(self.device, config.precision)
        self.optimizer = make_optimizer(self.trainable, config.optimizer, dtype=dtype)
        self._positions = {name: index for index, (name, _) in enumerate(self.trainable.named_parameters())}

    def _cut(self, prefix: str, model: nn.Module) -> None:
        """Keep this process's layers and slices of one model."""
        if self.grid.pipeline.size > 1:
            shared = keep_stage(model, self.grid.pipeline)
            self._tied |= {f"{prefix}{shared}"} if shared else set()
        if self.grid.tensor.size > 1:
            cut = cut_layers(model, self.grid.tensor)
            self._slices |= {f"{prefix}{name}": slice for name, slice in cut.slices.items()}
            self._summed |= {f"{prefix}{name}" for name in cut.summed}

    def _make_schedule(self, parts: dict[str, nn.Module]) -> Schedule | None:
        if self.grid.pipeline.size == 1:
            return None
        (model,) = parts.values()
        return Schedule(self.grid.pipeline, hidden_size=model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def _wrap(self) -> tuple[nn.Module, bool]:
        if self.world_size == 1:
            return self.trainable, False
        if self._execution.engine is EngineKind.FSDP:
            from torch.distributed.fsdp import fully_shard

            # Layer by layer, so that one layer at a time is whole; what is left belongs to the root.
            for layer in _decoder_layers(self.trainable):
                fully_shard(layer, mesh=self.grid.data_mesh)
            fully_shard(self.trainable, mesh=self.grid.data_mesh)
            return self.trainable, True
        if self._schedule is not None:  # DDP would expect each backward right after its forward
            return self.trainable, False
        return nn.parallel.DistributedDataParallel(
            self.trainable,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            process_group=self.grid.data.group,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # constants such as rotary frequencies, the same everywhere
        ), False

    def _call(self, compute: Callable[..., Result], *arguments: Any) -> Result:
        with autocast(self.device, self._config.precision):
            return self._module(compute, *moved(arguments, self.device))

    @torch.no_grad()
    def infer(self, compute: Callable[..., Result], *arguments: Any) -> Result:
        with evaluating(self.trainable):
            if self._schedule is None:
                return self._call(compute, *arguments)
            (batch,) = arguments
            share = Share(batch, 1.0)
            output = self._schedule.infer(share, forward=lambda share, received: self._stage(compute, share, received))
        return self.grid.pipeline.from_last(_on_cpu(output))

    def seed(self, seed: int, step: int) -> None:
        seed_models(seed, step, rank=self.processes.rank)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        self._reshard()
        with averaged(self.optimizer):
            yield
            self._reshard()  # what FSDP left whole are averages

    def freeze(self, model: nn.Module) -> nn.Module:
        self._frozen.append(model.requires_grad_(False).eval().to(self.device))
        return self._frozen[-1]

    def backward(self, loss: Callable[..., LossOutput], shares: Sequence[Share]) -> list[LossOutput]:
        if self._schedule is not None:
            return self._backward_through_stages(loss, shares, self._schedule)
        outputs = []
        for position, share in enumerate(shares):
            with self._synchronised_at(position == len(shares) - 1):
                out = self._call(loss, share.batch)
                self._scaled(out, share).backward()
            outputs.append(detached(out))
        return outputs

    def _scaled(self, out: LossOutput, share: Share) -> Tensor:
        """The share of the step's loss; DDP and FSDP average over ranks what we want summed."""
        averaged_over = self.world_size if self._sharded or self._module is not self.trainable else 1
        return share.of(out) * averaged_over * self._loss_scale.value

    def _synchronised_at(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients of all shares but the last stay on the rank."""
        if self._sharded:
            self.trainable.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif not last and isinstance(self._module, nn.parallel.DistributedDataParallel):
            return self._module.no_sync()
        return contextlib.nullcontext()

    def _backward_through_stages(
        self, loss: Callable[..., LossOutput], shares: Sequence[Share], schedule: Schedule
    ) -> list[LossOutput]:
        def backward(share: Share, output: Tensor | LossOutput, gradient: Tensor | None) -> None:
            with self._synchronised_at(share is shares[-1]):
                if isinstance(output, LossOutput):
                    self._scaled(output, share).backward()
                else:
                    output.backward(gradient)

        outputs = schedule.run(
            shares, forward=lambda share, received: self._stage(loss, share, received), backward=backward
        )
        # Without FSDP there is no wrapper around the stages, so gradients are summed over data ranks here, and plainly:
        # `_scaled` does not multiply by the ranks in this case.
        if not self._sharded:
            for parameter in self.trainable.parameters():
                if parameter.grad is not None:
                    self.grid.data.add_up(parameter.grad)
        return self.grid.pipeline.from_last([_on_cpu(detached(out)) for out in outputs])

    def _stage(self, loss: Callable[..., Any], share: Share, received: Tensor | None) -> Any:
        """This stage's part of a forward pass: hidden states, or the loss on the last stage."""
        return self._call(_run_stage, loss if self.grid.pipeline.is_last else None, share.batch, received)

    def step(
        self,
        learning_rate: float,
        *,
        accepts: Callable[[float], bool] = math.isfinite,
        rate_factors: Mapping[str, float] = NO_FACTORS,
    ) -> StepReport:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * rate_factors.get(group["part"], 1.0)
        self._complete_gradients()
        norm = self._grad_norm()
        grad_norm = float(norm)
        # Read before clipping and on the host: one wait for the device a step, which the metrics need anyway.
        skipped = not accepts(grad_norm)
        if not skipped:
            nn.utils.clip_grads_with_norm_(self.trainable.parameters(), self._config.optimizer.max_grad_norm, norm)
            self.optimizer.step()
            if self._config.optimizer.ema_decay:
                update_average(self.optimizer, self._config.optimizer.ema_decay)
        self._loss_scale.update(overflowed=not math.isfinite(grad_norm))
        self.optimizer.zero_grad(set_to_none=True)
        return StepReport(grad_norm, skipped)

    @torch.no_grad()
    def _complete_gradients(self) -> None:
        """Sum what the tensor axis and tied embeddings hold in parts; undo the loss scale."""
        for name, parameter in self.trainable.named_parameters():
            if parameter.grad is None:
                continue
            gradient = _local(parameter.grad)
            # Norms of queries and keys act on each rank's own heads: their gradients are parts of a sum.
            if name in self._summed:
                self.grid.tensor.add_up(gradient)
            # Embedding and output layer are one weight on two stages: each has the gradient of its own use.
            if name in self._tied and self._schedule is not None:
                gradient += self._schedule.swap_with_other_end(gradient)
            if self._loss_scale.value != 1.0:
                gradient /= self._loss_scale.value

    def _grad_norm(self) -> Tensor:
        """Over all processes, each weight once."""
        # Cut weights add up over the tensor axis; whole ones are the same on all its ranks and must count once.
        whole, cut = [], []
        for name, parameter in self.trainable.named_parameters():
            if parameter.grad is not None and not self._is_copy(name):
                (cut if name in self._slices else whole).append(parameter.grad)
        if self.grid.tensor.size * self.grid.pipeline.size == 1:
            return _full(nn.utils.get_total_norm(whole))
        norms = [_full(nn.utils.get_total_norm(grads)).to(self.device) for grads in (whole, cut)]
        # Norms of disjoint sets add in squares; float64 keeps the sum independent of the grid.
        whole_square, cut_square = (norm.double().square() for norm in norms)
        return self.grid.pipeline.add_up(whole_square + self.grid.tensor.add_up(cut_square)).sqrt().float()

    def sum(self, values: Iterable[float]) -> list[float]:
        return self.grid.data.sum(values)

    def max(self, value: float) -> float:
        return self.grid.data.max(value)

    def gather(self, items: list[Item]) -> list[Item]:
        return self.grid.data.gather(items)

    def all_done(self, done: bool) -> bool:
        return self.max(0.0 if done else 1.0) == 0.0 if self._sharded else done

    def model_weights(self, part: str) -> dict[str, Tensor]:
        with self.averaged():
            pieces = self._pieces()
        whole = whole_tensors(part_of(pieces, part), self.processes)
        return {**whole, **persistent_buffers(self.trainable.parts[part])}

    def held(self) -> Held:
        self._reshard()
        return held_by(self.trainable, self.optimizer, self._frozen, parameters=list(self.trainable.parameters()))

    def state_dict(self) -> dict[str, Piece]:
        return (
            {f"parameter/{name}": piece for name, piece in self._pieces(trained=True).items()}
            | self._moments()
            | ({_LOSS_SCALE: Piece(Box.whole((2,)), self._loss_scale.state())} if self.is_main else {})
        )

    def load_state_dict(self, state: SavedState) -> None:
        self._reshard()
        with torch.no_grad():
            for name, parameter in self.trainable.named_parameters():
                if not parameter.requires_grad:
                    continue
                box = self._box(name, parameter)
                _local(parameter).copy_(state.read(f"parameter/{name}", box))
                self.optimizer.state[parameter] = {
                    kind: self._loaded(state, f"{kind}/{name}", parameter, box) for kind in state.kinds(name)
                }
        if _LOSS_SCALE in state:
            self._loss_scale.load(state.read(_LOSS_SCALE, Box.whole((2,))))

    @staticmethod
    def _loaded(state: SavedState, key: str, parameter: Tensor, box: Box) -> Tensor:
        if state.is_scalar(key):
            return state.read(key, Box.whole(())).to(parameter.device)
        value = torch.zeros_like(parameter)
        _local(value).copy_(state.read(key, box))
        return value

    def _pieces(self, *, trained: bool = False) -> dict[str, Piece]:
        """Copies of the pieces of parameters, all or the trained ones, for which this process answers."""
        self._reshard()
        return {
            name: Piece(self._box(name, parameter), _copy(parameter))
            for name, parameter in self.trainable.named_parameters()
            if self._answers_for(name, parameter) and (parameter.requires_grad or not trained)
        }

    def _moments(self) -> dict[str, Piece]:
        state = {}
        for name, parameter in self.trainable.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                if value.ndim and self._answers_for(name, parameter):
                    state[f"{kind}/{name}"] = Piece(self._box(name, parameter), _copy(value))
                elif not value.ndim and self._is_first(name):
                    state[f"{kind}/{name}"] = scalar(value)
        return state

    def _reshard(self) -> None:
        """After a forward pass without backward, as in evaluations, FSDP leaves the root's parameters whole."""
        if self._sharded:
            self.trainable.reshard()  # type: ignore[operator]

    def _box(self, name: str, parameter: Tensor) -> Box:
        """Where this process's part lies in the whole parameter; FSDP deals rows as torch.chunk does."""
        shape, offsets, sizes = list(parameter.shape), [0] * parameter.ndim, tuple(_local(parameter).shape)
        if self._sharded:
            rows = -(-shape[0] // self.world_size)  # rounded up: the last ranks have fewer rows, or none
            offsets[0] = min(self.rank * rows, shape[0])
        if name in self._slices:
            cut = self._slices[name]
            shape[cut.dim] = cut.full
            offsets[cut.dim] += cut.start
        return Box(tuple(shape), tuple(offsets), sizes)

    def _answers_for(self, name: str, parameter: Tensor) -> bool:
        """Whether this process saves a piece that others hold too; the parameters are dealt out among them in turn."""
        index, count = (0, 1) if self._sharded else (self.rank, self.world_size)
        if name not in self._slices:
            index, count = index * self.grid.tensor.size + self.grid.tensor.rank, count * self.grid.tensor.size
        mine = self._positions[name] % count == index and not self._is_copy(name)
        return mine and _local(parameter).numel() > 0

    def _is_first(self, name: str) -> bool:
        return self.rank == self.grid.tensor.rank == 0 and not self._is_copy(name)

    def _is_copy(self, name: str) -> bool:
        """True of weights that belong to another stage: tied embeddings on the last one."""
        return self.grid.pipeline.rank > 0 and name in self._tied


def _run_stage(parts: nn.ModuleDict, loss: Callable[..., Any] | None, batch: Packed, received: Tensor | None) -> Any:
    (model,) = parts.values()
    set_received(model, received)
    return hidden_states(model, batch) if loss is None else loss(parts, batch)


def _decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of transformers models: what FSDP gathers and frees one at a time."""
    return [
        layer
        for container in module.modules()
        if isinstance(container, nn.ModuleList)
        for layer in container
        if any(True for _ in layer.parameters())
    ]


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def _copy(tensor: Tensor) -> Tensor:
    return _local(tensor).detach().to("cpu", copy=True)


def _on_cpu(output: Any) -> Any:
    """As it can be sent to other processes."""
    if not isinstance(output, LossOutput):
        return None
    return LossOutput(output.loss_sum.cpu(), {name: pair.cpu() for name, pair in output.metrics.items()})


def refuse_what_cannot_be_cut(parts: dict[str, nn.Module], config: TrainConfig, execution: ExecutionConfig) -> None:
    """Raise ConfigError for settings that tensor or pipeline parallelism does not go with."""
    if execution.tensor_parallel > 1 and config.optimizer.algorithm is Algorithm.MUON:
        raise ConfigError(
            f"optimizer.algorithm=muon needs whole matrices, which tensor_parallel={execution.tensor_parallel} cuts",
            advice="Use engine=fsdp, whose ranks gather them, or optimizer.algorithm=adamw.",
        )
    if execution.workers_per_copy > 1 and any(has_adapter(model) for model in parts.values()):
        raise ConfigError(
            "an adapter (lora.rank) does not go with tensor_parallel or pipeline_parallel",
            advice="Use engine=fsdp, or lora.rank=0.",
        )
    added = getattr(config, "neftune_alpha", 0.0) or any(routing_of(model) for model in parts.values())
    if execution.pipeline_parallel > 1 and added:
        raise ConfigError(
            f"pipeline_parallel={execution.pipeline_parallel} runs the bare next-token loss: neither the noise of "
            "neftune_alpha nor the balancing loss of a mixture of experts reaches through its stages",
            advice="Use engine=fsdp.",
        )
