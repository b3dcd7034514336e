"""How well training uses the hardware: `train/mfu` is model FLOPs per second over the devices' peak.

For a known GPU the peak is the data sheet's figure for dense matrix products. For a CPU and for unknown GPUs it is the
rate of a large product, measured when training starts: their data sheets say little about it.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from stages.data.tokens.packing import Packed
from stages.models.flops import FlopCounter

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
}
"""Dense bfloat16, from the makers' data sheets. The first name contained in the device's counts, so longer ones stand
before shorter ones."""

_SIDE, _SECONDS = 1024, 0.2


@dataclass(frozen=True)
class Meter:
    """Counts the work of micro-batches and compares it with the peak of all processes' devices."""

    counters: tuple[FlopCounter, ...]
    peak_flops: float

    @staticmethod
    def of(parts: Mapping[str, nn.Module], *, device: torch.device, dtype: torch.dtype) -> "Meter":
        """Make it before an engine cuts the models into shards."""
        num_devices = dist.get_world_size() if dist.is_initialized() else 1
        return Meter(tuple(FlopCounter.of(model) for model in parts.values()), num_devices * peak_flops(device, dtype))

    def flops(self, batch: Packed) -> float:
        return sum(counter.training(batch) for counter in self.counters)

    def utilisation(self, flops: float, seconds: float) -> float:
        return flops / seconds / self.peak_flops


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the device's operations a second at most, from the table or measured; the log says which."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if known := [flops for part, flops in _BF16_FLOPS.items() if part in name]:
            logger.info("train/mfu is relative to the %.0f TFLOP/s of %s by its data sheet", known[0] / 1e12, name)
            return known[0]
    rate = _matmul_rate(device, dtype)
    logger.info("train/mfu is relative to %.1f GFLOP/s, measured on a %s product of this %s", rate / 1e9, dtype, device)
    return rate


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    left, right = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
    float((left @ right).sum())  # warm
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < _SECONDS:
        float((left @ right)[0, 0])  # waits for the device
        count += 1
    return 2.0 * _SIDE**3 * count / (time.perf_counter() - started)


def with_waiting(items: Iterable[Item]) -> Iterator[tuple[Item, float]]:
    """Yield each item with the seconds that it was waited for."""
    iterator = iter(items)
    while True:
        started = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item, time.perf_counter() - started
