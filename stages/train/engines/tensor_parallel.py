"""Tensor parallelism: every rank of the tensor axis holds some heads and some feed-forward columns of every layer.

Weights are cut in place and stay plain tensors; the two collectives of Megatron-LM (Shoeybi et al. 2019,
arXiv:1909.08053: f before the columns, g after the rows) are hooks. So DDP, FSDP2, optimizers and loss functions see an
ordinary, narrower model, which torch's DTensor plans would not give them. What is cut is read from the model's own
`base_model_tp_plan`. Embeddings, norms and the output layer are whole on every rank.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stages.config.errors import ConfigError
from stages.train.ranks import Axis

_SUMMED = "replicated_with_grad_allreduce"
"""Whole weights that act on a rank's own heads only (norms of queries and keys): their gradients are partial."""


@dataclass(frozen=True)
class Slice:
    """Where a rank's part lies in the whole weight."""

    dim: int
    start: int
    full: int


@dataclass
class Cut:
    """What was done to a model; names are relative to it."""

    slices: dict[str, Slice] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)


def cut_layers(model: Any, axis: Axis) -> Cut:
    """Leave this rank's slices in the model; raises ConfigError when it cannot be cut into that many."""
    check_cuttable(model, axis.size)
    plan: dict[str, str] = model.config.base_model_tp_plan
    cut = Cut()
    # Attention and feed-forward blocks. The sum of gradients (f) stands before the block, not before each projection:
    # query, key and value share their input, and one collective serves the three.
    blocks: set[str] = set()
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    for name, module in list(model.base_model.named_modules()):
        match plan.get(re.sub(r"\.\d+\.", ".*.", name)):
            case "colwise":
                _narrow(module, f"{prefix}{name}", axis, cut, dims={"weight": 0, "bias": 0})
                blocks.add(name.rpartition(".")[0])
            case "rowwise":
                _narrow(module, f"{prefix}{name}", axis, cut, dims={"weight": 1})
                module.register_forward_hook(lambda row, _, out: _leave(row, out, axis))
            case "replicated_with_grad_allreduce":
                cut.summed |= {f"{prefix}{name}.{own}" for own, _ in module.named_parameters()}
    for block in blocks:
        model.base_model.get_submodule(block).register_forward_pre_hook(
            lambda _, args, kwargs: _enter(args, kwargs, axis), with_kwargs=True
        )
    return cut


def check_cuttable(model: Any, size: int) -> None:
    """Raise ConfigError when a model cannot be cut into `size` parts; its weights are not looked at."""
    config = model.config
    plan: dict[str, str] = config.base_model_tp_plan or {}
    unknown = {style for name, style in plan.items() if name.startswith("layers.")} - {"colwise", "rowwise", _SUMMED}
    if not plan or unknown:
        raise ConfigError(
            f"tensor_parallel={size}: {type(model).__name__} has no plan that could be followed"
            + (f" ({', '.join(sorted(unknown))})" if unknown else ""),
            advice="Use engine=fsdp or engine=deepspeed with tensor_parallel=1 for this architecture.",
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise ConfigError(
                f"tensor_parallel={size} does not divide the model's {name}={getattr(config, name)}",
                advice="Use a divisor of all three: query heads, key and value heads, feed-forward width.",
            )


def _narrow(module: nn.Module, name: str, axis: Axis, cut: Cut, *, dims: dict[str, int]) -> None:
    for own, dim in dims.items():
        whole = getattr(module, own)
        if whole is None:
            continue
        length = whole.shape[dim] // axis.size
        # A copy: a view would keep the whole weight in memory.
        part = whole.detach().narrow(dim, axis.rank * length, length).clone()
        setattr(module, own, nn.Parameter(part, requires_grad=whole.requires_grad))
        cut.slices[f"{name}.{own}"] = Slice(dim, axis.rank * length, whole.shape[dim])


def _enter(args: tuple[Any, ...], kwargs: dict[str, Any], axis: Axis) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Attention and feed-forward take the hidden states first, or by that name."""
    if args:
        return (_SumGradient.apply(args[0], axis), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _SumGradient.apply(kwargs["hidden_states"], axis)}


def _leave(row: Any, out: Tensor, axis: Axis) -> Tensor:
    """The bias is whole on every rank and must be added once."""
    if row.bias is None:
        return _Sum.apply(out, axis)  # type: ignore[return-value]
    return _Sum.apply(out - row.bias, axis) + row.bias  # type: ignore[operator]


class _SumGradient(torch.autograd.Function):
    """Megatron's f: identity forward, sum over ranks backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.add_up(grad_outputs[0].contiguous()), None


class _Sum(torch.autograd.Function):
    """Megatron's g: sum over ranks forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, axis: Axis) -> Tensor:
        return axis.add_up(partial.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None
