"""What every engine does with the models of its own process: precision, recomputed activations, compilation, names."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.config.errors import ConfigError
from stages.config.execution import Engine, ExecutionConfig
from stages.data.tokens.packing import Packed
from stages.models.lora import adapts_parameters
from stages.train.engine import Held, LossOutput


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse float16 on a CPU, which has no kernels for it."""
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "precision='fp16' needs a GPU: processors emulate float16, slower than float32 and with its overflows",
            advice="Use precision=bf16, which needs no loss scaling, or fp32; or give the workers GPUs.",
        )


def seed_models(seed: int, step: int, *, rank: int) -> None:
    """Start the random numbers of a step anew."""
    key = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(key))


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout inside."""
    module.eval()
    try:
        yield
    finally:
        module.train()


def moved(arguments: tuple[Any, ...], device: torch.device) -> list[Any]:
    """The arguments of a function of models, batches on the device."""
    return [argument.to(device) if isinstance(argument, Packed) else argument for argument in arguments]


def make_deterministic() -> None:
    """The same bits every time on the CPU: compiled code would add embedding gradients in whatever order threads come.

    Filling fresh memory, which the mode adds, costs time and protects from nothing here.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def prepare(model: nn.Module, execution: ExecutionConfig) -> None:
    if execution.compile and adapts_parameters(model):
        raise ConfigError(
            "compile=true does not go with lora.target_parameters, whose adapters are put into the weights and taken "
            "out again in every forward pass",
            advice="Use compile=false.",
        )
    cuts_weights = execution.engine is Engine.FSDP or (
        execution.engine is Engine.DEEPSPEED and execution.zero_stage == 3
    )
    if cuts_weights and getattr(model, "is_quantized", False):
        raise ConfigError(
            f"lora.quantization does not go with engine={execution.engine}, which cuts weights into shards: packed "
            "ones would lose their scales",
            advice="Use engine=ddp, or lora.quantization=none.",
        )
    if execution.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if execution.compile:
        model.base_model.compile()  # type: ignore[union-attr, operator]
    model.train()


def detached(output: LossOutput) -> LossOutput:
    return output._replace(loss_sum=output.loss_sum.detach(), token_loss_sum=None)


def held_by(
    module: nn.Module, optimizer: torch.optim.Optimizer, frozen: list[nn.Module], *, parameters: list[Tensor]
) -> Held:
    """What a process holds for a training, whose trained weights are `parameters`."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return Held(
        parameters=[*parameters, *module.buffers()],
        gradients=[one.grad for one in module.parameters() if one.grad is not None],
        optimizer=[value for value in states if isinstance(value, Tensor)],
        frozen=[tensor for model in frozen for tensor in (*model.parameters(), *model.buffers())],
    )


def part_of(state: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Entries of one part of the root, by the part's own names."""
    prefix = f"parts.{part}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What is saved with a model besides its parameters; the same on every process."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value.detach().cpu() for name, value in model.state_dict().items() if name not in parameters}
