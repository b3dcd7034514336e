"""An exponential moving average of the weights, kept as optimizer state: it is sharded, saved and resumed with it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_KEY = "average"


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """average <- decay average + (1 - decay) weights, starting as the weights after the first update."""
    averages: list[Tensor] = []
    parameters: list[Tensor] = []
    for parameter in _trained(optimizer):
        state = optimizer.state[parameter]
        if _KEY in state:
            averages.append(state[_KEY])
            parameters.append(parameter)
        elif state:  # a parameter that has no gradient yet has no state either
            # No bias correction is needed: the average starts at weights and not at zero.
            state[_KEY] = parameter.detach().clone()
    if averages:
        # One kernel for all parameters, in float32 like the weights: a decay of 0.9999 would be lost in bfloat16.
        torch._foreach_lerp_(averages, parameters, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


@contextlib.contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the weights are their averages, where there are any; afterwards they are what they were, bit for bit."""
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for parameter in _trained(optimizer):
            if (average := optimizer.state.get(parameter, {}).get(_KEY)) is not None:
                # A copy and no arithmetic back and forth, which would not restore the same bits.
                kept.append((parameter, parameter.detach().clone()))
                parameter.copy_(average)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, raw in kept:
                parameter.copy_(raw)


def _trained(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
