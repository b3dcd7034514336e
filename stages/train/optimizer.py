"""AdamW groups and learning-rate schedules."""

import math

import torch
from torch import nn

from stages.config.train import OptimizerConfig, Schedule


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Decay matrices, leave norms and biases alone; one fused kernel per group."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, *, step: int, num_steps: int) -> float:
    """Return the rate of step `step` (0-based): linear warm-up, then the schedule down to its minimum at the last
    step."""
    warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(num_steps - 1 - warmup, 1)
    match config.schedule:
        case Schedule.CONSTANT:
            factor = 1.0
        case Schedule.LINEAR:
            factor = 1.0 - (1.0 - config.min_learning_rate_ratio) * share
        case Schedule.COSINE:
            low = config.min_learning_rate_ratio
            factor = low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * share))
    return config.learning_rate * factor
