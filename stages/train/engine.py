"""How parameters, gradients and numbers are spread over ranks: one process, DDP or FSDP2 behind one small object.

Whatever uses parameters runs inside the forward of one root module (`Trainable`), so that the wrappers' hooks see it:
losses, rollouts and evaluations alike are `engine.call(function, batch)`.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stages.config.execution import Engine as EngineKind
from stages.config.execution import ExecutionConfig
from stages.config.train import TrainConfig
from stages.data.packing import Packed
from stages.models.precision import autocast
from stages.train.optimizer import make_optimizer

Result = TypeVar("Result")
Item = TypeVar("Item")


class Trainable(nn.Module):
    """The root that engines wrap: named models, and a forward that runs any function of them."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, compute: Callable[..., Result], *arguments: Any) -> Result:
        return compute(self.parts, *arguments)


class StepReport(NamedTuple):
    """What an optimizer step did."""

    grad_norm: float
    """Before clipping."""
    skipped: bool
    """True when the gradient was not finite and the parameters were left alone."""


class Engine:
    """Owns the trained parameters, their optimizer, the device and the collectives."""

    def __init__(self, parts: dict[str, nn.Module], config: TrainConfig, execution: ExecutionConfig) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.device = local_device()
        if self.device.type == "cpu":
            _make_deterministic()
        self._config, self._execution = config, execution
        self.trainable = Trainable(**parts).to(self.device)
        for model in parts.values():
            _prepare(model, execution)
        self._module, self._sharded = self._wrap()
        self.optimizer = make_optimizer(self.trainable, config.optimizer)

    def _wrap(self) -> tuple[nn.Module, bool]:
        if self.world_size == 1:
            return self.trainable, False
        if self._execution.engine is EngineKind.FSDP:
            from torch.distributed.fsdp import fully_shard

            for layer in _decoder_layers(self.trainable):
                fully_shard(layer)
            fully_shard(self.trainable)
            return self.trainable, True
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(self.trainable, device_ids=ids, gradient_as_bucket_view=True), False

    def call(self, compute: Callable[..., Result], *arguments: Any) -> Result:
        """Run `compute(parts, *arguments)` in the root's forward, in the run's precision, batches on the device."""
        moved = [argument.to(self.device) if isinstance(argument, Packed) else argument for argument in arguments]
        with self.autocast():
            return self._module(compute, *moved)

    @torch.no_grad()
    def infer(self, compute: Callable[..., Result], *arguments: Any) -> Result:
        """As `call`, without gradients."""
        return self.call(compute, *arguments)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.device, self._config.precision)

    def freeze(self, model: nn.Module) -> nn.Module:
        """Move a model that is only read (reference, reward) to the device and take its gradients away."""
        return model.requires_grad_(False).eval().to(self.device)

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a share of the global loss; ranks are summed, not averaged, at the last share."""
        if self._sharded:
            self.trainable.set_requires_gradient_sync(last)  # type: ignore[operator]
        (loss * self.world_size).backward()

    def defer_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Forward and backward inside leave the gradient on the rank: every micro-batch but the last."""
        if isinstance(self._module, nn.parallel.DistributedDataParallel):
            return self._module.no_sync()
        return contextlib.nullcontext()

    def step(self, learning_rate: float) -> StepReport:
        """Clip, update and clear; a gradient that is not finite changes nothing and is reported."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.parameters(), self._config.optimizer.max_grad_norm)
        grad_norm = float(_full(norm))
        skipped = not torch.isfinite(torch.tensor(grad_norm)).item()
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepReport(grad_norm, skipped)

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sum each number over ranks, in float64."""
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def max(self, value: float) -> float:
        """Return the largest of all ranks' values."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def gather(self, items: list[Item]) -> list[Item]:
        """Concatenate every rank's items, small ones, in the order of ranks."""
        if self.world_size == 1:
            return items
        everybody: list[list[Item]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(everybody, items)
        return [item for part in everybody for item in part]

    def all_done(self, done: bool) -> bool:
        """Agree on the end of a generation; only sharded models need to."""
        return self.max(0.0 if done else 1.0) == 0.0 if self._sharded else done

    def model_weights(self, part: str) -> dict[str, Tensor]:
        """Return one part's full weights on the CPU; every rank must call it."""
        return {name: _full(tensor).detach().cpu() for name, tensor in self._part(part).state_dict().items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return full copies of parameters and optimizer moments on the CPU; every rank must call it."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.trainable.named_parameters():
            state[f"parameter/{name}"] = _copy(parameter)
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{key}/{name}"] = _copy(value)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned, at this or another world size."""
        with torch.no_grad():
            for name, parameter in self.trainable.named_parameters():
                parameter.copy_(_like(state[f"parameter/{name}"], parameter))
                self.optimizer.state[parameter] = {
                    key: _like(state[f"{key}/{name}"], parameter) if key != "step" else state[f"{key}/{name}"].clone()
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}/{name}" in state
                }

    def _part(self, name: str) -> nn.Module:
        return self.trainable.parts[name]


def _make_deterministic() -> None:
    """The same bits every time on the CPU: compiled code would add embedding gradients in whatever order threads come.

    Filling fresh memory, which the mode adds, costs time and protects from nothing here.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def local_device() -> torch.device:
    """The GPU of this worker, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    from ray.train.torch import get_device

    device = get_device()
    return device if isinstance(device, torch.device) else device[0]


def _prepare(model: nn.Module, execution: ExecutionConfig) -> None:
    if execution.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if execution.compile:
        model.base_model.compile()  # type: ignore[union-attr, operator]
    model.train()


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


def _copy(tensor: Tensor) -> Tensor:
    return _full(tensor).detach().to("cpu", copy=True)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    if not hasattr(parameter, "device_mesh"):
        return value.to(parameter.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
