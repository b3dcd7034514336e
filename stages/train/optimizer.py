"""Which parameters are updated how, and learning-rate schedules."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stages.config.errors import ConfigError
from stages.config.train import Algorithm, OptimizerConfig, Schedule
from stages.train.muon import Muon

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu")
"""Where torch has one kernel for a whole group of AdamW."""


def make_optimizer(module: nn.Module, config: OptimizerConfig, *, dtype: torch.dtype) -> torch.optim.Optimizer:
    """Make the optimizer of all parameters that want a gradient; `dtype` is that of Muon's matrix products."""
    groups = parameter_groups(module, config)
    # Fused also on the CPU: one pass over memory, where the default makes a dozen.
    fused = all(parameter.device.type in _FUSED_DEVICES for group in groups for parameter in group["params"])
    common: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.epsilon}
    match config.algorithm:
        case Algorithm.ADAMW:
            for group in groups:
                del group["muon"]
            return torch.optim.AdamW(groups, **common, fused=fused)
        case Algorithm.MUON:
            if not any(group["muon"] for group in groups):
                raise ConfigError(
                    "optimizer.algorithm=muon, but the model has no matrices in repeated layers",
                    advice="Use optimizer.algorithm=adamw.",
                )
            return Muon(groups, **common, momentum=config.muon_momentum, fused=fused, dtype=dtype)


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return groups with `params`, `weight_decay`, `muon` and `part`, the model of a `Trainable` that they belong to.

    Not decayed: norms, biases and other parameters that are no matrices, and embeddings unless the config says so. A
    tied weight counts as an embedding. Muon updates the matrices of the repeated layers.
    """
    repeated = {
        id(parameter)
        for container in module.modules()
        if isinstance(container, nn.ModuleList)
        for parameter in container.parameters()
    }
    # Modules come in order of definition, embeddings before the output layer: a tied weight is met as an embedding.
    groups: dict[tuple[bool, bool, str], list[Tensor]] = {}
    seen: set[int] = set()
    for path, owner in module.named_modules():
        part = path.split(".")[1] if path.startswith("parts.") else ""
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_embedding = isinstance(owner, nn.Embedding)
            # The experts of a layer are one parameter of three dimensions: a stack of matrices.
            is_matrix = parameter.ndim >= 2 and "bias" not in name and "norm" not in type(owner).__name__.lower()
            decays = is_matrix and (config.decay_embeddings or not is_embedding)
            key = (decays, is_matrix and not is_embedding and id(parameter) in repeated, part)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "muon": muon, "part": part}
        for (decays, muon, part), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def learning_rate(config: OptimizerConfig, *, step: int, num_steps: int, tokens_per_step: int = 0) -> float:
    """Return the rate of step `step` (0-based): linear warm-up, then the schedule down to its minimum at the last
    step. A function of the step alone, so that a resume continues with the same rates.

    WSD: Hu et al. 2024 (arXiv:2404.06395), with the 1 - sqrt decay of Hägele et al. 2024 (arXiv:2405.18392).
    """
    warmup, decay = schedule_steps(config, num_steps=num_steps, tokens_per_step=tokens_per_step)
    # step + 1: the first step would otherwise train with a rate of 0.
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    low = config.min_learning_rate_ratio
    start = warmup
    if config.schedule is Schedule.WSD:
        start = max(warmup, num_steps - decay)  # between warm-up and here the rate is at its peak: share is 0
    # num_steps - 1: the last step, and not one after it, has the minimum.
    share = max(0.0, (step - start) / max(num_steps - 1 - start, 1))
    match config.schedule:
        case Schedule.CONSTANT:
            factor = 1.0
        case Schedule.LINEAR:
            factor = 1.0 - (1.0 - low) * share
        case Schedule.COSINE:
            factor = low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * share))
        case Schedule.WSD:
            factor = low + (1.0 - low) * (1.0 - math.sqrt(share))
    return config.learning_rate * factor


class ScheduleSteps(NamedTuple):
    """Lengths of a schedule's parts."""

    warmup: int
    decay: int
    """Of `wsd`."""


def schedule_steps(config: OptimizerConfig, *, num_steps: int, tokens_per_step: int = 0) -> ScheduleSteps:
    """Return warm-up and decay in steps, tokens rounded up to whole ones; raises ConfigError when they do not fit."""
    warmup, asked = _given("warmup", config.warmup_steps, config.warmup_tokens, tokens_per_step)
    if warmup >= num_steps > 0:
        raise ConfigError(
            f"{asked}, but there are only {num_steps} steps",
            advice=f"Use at most {num_steps - 1} steps, or 0 and warmup_fraction.",
        )
    warmup = warmup or math.ceil(config.warmup_fraction * num_steps)
    decay, asked = _given("decay", config.decay_steps, config.decay_tokens, tokens_per_step)
    if decay > num_steps - warmup:
        raise ConfigError(
            f"{asked}, but {warmup} of {num_steps} steps are warm-up",
            advice=f"Use at most {num_steps - warmup} steps, or 0 and decay_fraction.",
        )
    return ScheduleSteps(warmup, decay or math.ceil(config.decay_fraction * num_steps))


def _given(name: str, steps: int, tokens: int, tokens_per_step: int) -> tuple[int, str]:
    """Return a length in steps, 0 for none, and how it was given."""
    if not tokens:
        return steps, f"optimizer.{name}_steps={steps}"
    # Rounded up: a length in tokens is reached, never missed by a part of a step.
    in_steps = math.ceil(tokens / tokens_per_step)
    return in_steps, f"optimizer.{name}_tokens={tokens}, which is {in_steps} steps of {tokens_per_step} tokens"
