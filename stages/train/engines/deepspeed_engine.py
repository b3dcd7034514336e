"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients too (2), parameters too (3) in shards, optionally offloaded.

Weights stay in float32 and lower precision comes from autocast, as in the other engines: ZeRO only spreads and reduces.
It averages gradients over ranks, so losses are multiplied by their number; it clips by the global norm as torch does,
and leaves parameters alone when that norm is not finite. Its flat partitions are read and written by parameter name, so
checkpoints are those of every engine. This reaches below DeepSpeed's public interface; its version is pinned.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from stages.config.errors import ConfigError
from stages.config.execution import ExecutionConfig
from stages.config.train import Algorithm, OptimizerConfig, TrainConfig
from stages.job.devices import local_device
from stages.models.precision import autocast
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
from stages.train.optimizer import make_optimizer
from stages.train.ranks import Grid
from stages.train.shards import Box, Piece, SavedState, scalar, whole_tensors

Result = TypeVar("Result")
Item = TypeVar("Item")


class _Range(NamedTuple):
    """The elements of a parameter for whose optimizer state this rank answers."""

    partition: nn.Parameter
    """Flat float32 master weights of many parameters' ranges."""
    at: int
    """Where the range starts in the partition."""
    start: int
    """Where it starts in the parameter."""
    length: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.detach().narrow(0, self.at, self.length)


class DeepSpeedEngine:
    """See `stages.train.engine.Engine`."""

    def __init__(self, parts: dict[str, nn.Module], config: TrainConfig, execution: ExecutionConfig) -> None:
        self.device = local_device()
        check_precision(config.precision, self.device)
        if config.precision == "fp16":
            raise ConfigError(
                "precision='fp16' does not go with engine=deepspeed: the loss is scaled by PyTorch's engines only",
                advice="Use engine=fsdp, or precision=bf16 or fp32.",
            )
        _refuse_what_is_not_there(config.optimizer)
        self.grid = Grid(self.device)
        self.processes, self.is_main = self.grid.processes, self.grid.is_main
        self.rank, self.world_size = self.grid.data.rank, self.grid.data.size
        if self.device.type == "cpu":
            make_deterministic()
        self._config, self._stage = config, execution.zero_stage
        self._frozen: list[nn.Module] = []
        self.trainable = Trainable(**parts).to(self.device)
        self._shapes = {name: parameter.shape for name, parameter in self.trainable.named_parameters()}
        for model in parts.values():
            prepare(model, execution)
        self._module, self._zero, _, _ = _import_deepspeed(self.device).initialize(
            model=self.trainable,
            optimizer=make_optimizer(self.trainable, config.optimizer, dtype=torch.float32),
            config=_settings(config, execution, self.device),
        )
        self.optimizer: torch.optim.Optimizer = self._zero.optimizer

    def _call(self, compute: Callable[..., Result], *arguments: Any) -> Result:
        def in_precision(parts: nn.ModuleDict, *rest: Any) -> Result:  # DeepSpeed switches off an autocast around it
            with autocast(self.device, self._config.precision):
                return compute(parts, *rest)

        return self._module(in_precision, *moved(arguments, self.device))

    @torch.no_grad()
    def infer(self, compute: Callable[..., Result], *arguments: Any) -> Result:
        with evaluating(self.trainable):
            return self._call(compute, *arguments)

    def seed(self, seed: int, step: int) -> None:
        seed_models(seed, step, rank=self.rank)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def freeze(self, model: nn.Module) -> nn.Module:
        self._frozen.append(model.requires_grad_(False).eval().to(self.device))
        return self._frozen[-1]

    def backward(self, loss: Callable[..., LossOutput], shares: Sequence[Share]) -> list[LossOutput]:
        outputs = []
        for position, share in enumerate(shares):
            # Gradients are reduced at the boundary only; DeepSpeed would otherwise count micro-batches by itself.
            self._module.set_gradient_accumulation_boundary(position == len(shares) - 1)
            out = self._call(loss, share.batch)
            # ZeRO averages over ranks, we sum. The share is scaled already: `gas` would divide it once more.
            self._module.backward(share.of(out) * self.world_size, scale_wrt_gas=False)
            outputs.append(detached(out))
        return outputs

    def step(
        self,
        learning_rate: float,
        *,
        accepts: Callable[[float], bool] = math.isfinite,
        rate_factors: Mapping[str, float] = NO_FACTORS,
    ) -> StepReport:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * rate_factors.get(group["part"], 1.0)
        self._module.step()  # judges by itself, as `accepts` does where there is no spike rule
        grad_norm = float(self._module.get_global_grad_norm())
        accepted = accepts(float("inf") if self._zero.overflow else grad_norm)
        return StepReport(grad_norm, skipped=not accepted)

    def sum(self, values: Iterable[float]) -> list[float]:
        return self.grid.data.sum(values)

    def max(self, value: float) -> float:
        return self.grid.data.max(value)

    def gather(self, items: list[Item]) -> list[Item]:
        return self.grid.data.gather(items)

    def all_done(self, done: bool) -> bool:
        return self.max(0.0 if done else 1.0) == 0.0 if self._stage == 3 else done

    def model_weights(self, part: str) -> dict[str, Tensor]:
        whole = part_of(whole_tensors(self._pieces(), self.processes), part)
        shapes = part_of(self._shapes, part)
        buffers = persistent_buffers(self.trainable.parts[part])
        return {name: flat.view(shapes[name]) for name, flat in whole.items()} | buffers

    def held(self) -> Held:
        """Gradients lie in buffers of DeepSpeed's own, so there are none here."""
        shards: list[Tensor] = [
            parameter.ds_tensor if self._stage == 3 else parameter  # pyright: ignore[reportAttributeAccessIssue]
            for parameter in self.trainable.parameters()
        ]
        found = held_by(self.trainable, self.optimizer, self._frozen, parameters=shards)
        masters = (
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        return found._replace(optimizer=[*found.optimizer, *masters])

    def state_dict(self) -> dict[str, Piece]:
        trained = {name for name, parameter in self.trainable.named_parameters() if parameter.requires_grad}
        state = {f"parameter/{name}": piece for name, piece in self._pieces().items() if name in trained}
        for name, parameter in self.trainable.named_parameters():
            held = self._range(parameter)
            if held is None:
                continue
            for kind, value in self.optimizer.state.get(held.partition, {}).items():
                if value.ndim:
                    state[f"{kind}/{name}"] = _piece(held.of(value), parameter, self._shapes[name].numel(), held.start)
                elif held.start == 0:
                    state[f"{kind}/{name}"] = scalar(value)
        return state

    def load_state_dict(self, state: SavedState) -> None:
        # The state of a partition belongs to many parameters: it is filled range by range below.
        self.optimizer.state.clear()
        for name, parameter in self.trainable.named_parameters():
            if not parameter.requires_grad:
                continue
            self._load_parameter(parameter, state, name)
            held = self._range(parameter)
            if held is None:
                continue
            box = Box.flat(self._shapes[name].numel(), held.start, held.length)
            held.of(held.partition).copy_(state.read(f"parameter/{name}", box))
            kept = self.optimizer.state[held.partition]
            for kind in state.kinds(name):
                if state.is_scalar(f"{kind}/{name}"):
                    kept[kind] = state.read(f"{kind}/{name}", Box.whole(())).to(held.partition.device)
                else:
                    flat = kept.setdefault(kind, torch.zeros_like(held.partition).detach())
                    held.of(flat).copy_(state.read(f"{kind}/{name}", box))

    def _load_parameter(self, parameter: Any, state: SavedState, name: str) -> None:
        """Fill in what forward passes read; the master weights are set apart."""
        numel = self._shapes[name].numel()
        if self._stage == 3:
            start, length = self._share_of(parameter)
            parameter.ds_tensor.detach()[:length].copy_(state.read(f"parameter/{name}", Box.flat(numel, start, length)))
        if parameter.numel() == numel:  # whole on this rank, as ZeRO 3 leaves small ones
            parameter.detach().copy_(state.read(f"parameter/{name}", Box.whole(tuple(self._shapes[name]))))

    def _pieces(self) -> dict[str, Piece]:
        """Copies of the ranges of all parameters for which this rank answers."""
        pieces = {}
        for name, parameter in self.trainable.named_parameters():
            numel = self._shapes[name].numel()
            if self._stage == 3:
                start, length = self._share_of(parameter)
                values = parameter.ds_tensor.detach()[:length]  # pyright: ignore[reportAttributeAccessIssue]
            elif not parameter.requires_grad:  # in no partition: whole on every rank
                start, values = 0, parameter.detach().flatten()[: numel if self.is_main else 0]
            else:
                held = self._range(parameter)
                if held is None:
                    continue
                start, values = held.start, held.of(held.partition)
            if values.numel():
                pieces[name] = _piece(values, parameter, numel, start)
        return pieces

    def _share_of(self, parameter: Any) -> tuple[int, int]:
        """Start and length of this rank's part of a parameter under ZeRO 3; the last ranks' are shorter, or empty."""
        # All ranks hold tensors of one size, so the last ones are padded; padding is no part of the parameter.
        size = parameter.ds_tensor.numel()
        start = min(self.rank * size, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    def _range(self, parameter: Any) -> _Range | None:
        """Find a parameter's elements in this rank's flat master weights; None where it has none of them."""
        if not parameter.requires_grad:
            return None
        # Stage 3 cuts every parameter over all ranks. `grad_position` holds, by parameter, the optimizer group, where
        # the rank's part starts in that group's flat partition, and its padded length, which we must not use.
        if self._stage == 3:
            group, at, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start, length = self._share_of(parameter)
            return _Range(self._zero.fp32_partitioned_groups_flat[group], at, start, length) if length else None
        # Stages 1 and 2 lay all parameters of a group end to end and cut that line over ranks, so a parameter may be
        # on one rank, across several, or not on this one. DeepSpeed notes the fragment twice: `hp`, high precision, as
        # a place in the rank's master weights, and `lp`, low precision, as a place in the parameter that forward passes
        # read.
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        partition = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        held, own = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Range(partition, held.start, own.start, own.numel)


def _refuse_what_is_not_there(config: OptimizerConfig) -> None:
    """ZeRO steps on flat partitions and decides about a step by itself."""
    asked = {
        "optimizer.algorithm=muon": config.algorithm is Algorithm.MUON,
        f"optimizer.ema_decay={config.ema_decay}": config.ema_decay > 0,
        f"optimizer.spike_window={config.spike_window}": config.spike_window > 0,
    }
    for setting in (setting for setting, is_asked in asked.items() if is_asked):
        raise ConfigError(f"{setting} does not go with engine=deepspeed", advice="Use engine=fsdp.")


def _piece(values: Tensor, parameter: Any, numel: int, start: int) -> Piece:
    return Piece(Box.flat(numel, start, values.numel()), values.to("cpu", copy=True))


def _settings(config: TrainConfig, execution: ExecutionConfig, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    zero: dict[str, Any] = {"stage": execution.zero_stage, "overlap_comm": on_gpu}
    if execution.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: the loop deals batches and says where steps end
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "steps_per_print": 1 << 40,
        "zero_optimization": zero,
        # torch's fused AdamW serves; DeepSpeed's own for the CPU would be compiled on every machine first
        "zero_force_ds_cpu_optimizer": False,
    }


def _import_deepspeed(device: torch.device) -> Any:
    """Import it, and on the CPU keep it to plain gloo: its shared-memory collectives need a compiler at run time."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"engine=deepspeed: {error}",
            advice="Install the extra `deepspeed` on the workers, or use engine=fsdp, which shards as ZeRO 3 does.",
        ) from error
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    return deepspeed
