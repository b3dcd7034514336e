"""Where a gate computes, in which pieces and number format, and how much of it a CPU can take."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from stages.config.execution import ExecutionConfig
from stages.config.request import Manifest
from stages.models.precision import autocast, compute_dtype

logger = logging.getLogger("athanor")

_MOST_FLOPS = 4e13
"""For each thing that is measured on a CPU: minutes."""
_FEWEST = 64
"""Items that a measurement is cut to at least; the interval of fewer would make a good model fail."""
_SHARE_OF_MEMORY = 0.8
"""Of a GPU, for weights; the rest is for what they compute."""
_SAID_SECONDS = 30.0


class _Beat:
    """Says now and then how far a measurement is: the watcher stops a job that is silent for long."""

    def __init__(self) -> None:
        self._said, self._batches = time.monotonic(), 0

    def __call__(self, what: str) -> None:
        self._batches += 1
        if time.monotonic() - self._said >= _SAID_SECONDS:
            self._said = time.monotonic()
            logger.info("measuring %s: %d batches so far", what, self._batches)


@dataclass(frozen=True)
class Affordable:
    """How many of the items may be measured; `why` says what the others would take, empty where all are."""

    items: int
    why: str = ""


@dataclass(frozen=True)
class Computing:
    """Where and in which pieces to compute."""

    device: torch.device
    row_length: int
    max_rows: int
    pad_id: int
    beat: _Beat = field(default_factory=_Beat)

    def affordable(self, models: Sequence[nn.Module], lengths: np.ndarray, *, asked: int) -> Affordable:
        """How many of `asked` items, whose mean length is that of `lengths`, pass through the models here; 0 where
        only a few would."""
        if self.device.type != "cpu" or not asked:
            return Affordable(asked)
        each = 2.0 * float(lengths.mean()) * sum(weight.numel() for model in models for weight in model.parameters())
        fits = int(_MOST_FLOPS // max(each, 1.0))
        if fits >= asked:
            return Affordable(asked)
        why = f"{asked} of them take {each * asked:.1e} FLOPs, and on a CPU a gate spends {_MOST_FLOPS:.0e}"
        return Affordable(fits if fits >= _FEWEST else 0, why)

    def precision_of(self, manifest: Manifest) -> str:
        """The `precision` in which this device computes as training did; `fp32` where it cannot."""
        recorded = manifest.execution.get("compute_dtype")
        if recorded == "bfloat16" and compute_dtype(self.device) is torch.bfloat16:
            return "bf16"
        return "fp16" if recorded == "float16" and self.device.type == "cuda" else "fp32"

    def as_trained(self, manifest: Manifest) -> torch.autocast:
        """Compute as training did, as far as this device does."""
        return autocast(self.device, self.precision_of(manifest))

    def computes_as(self, manifest: Manifest) -> bool:
        """Whether that is training's own number format."""
        dtype = str(compute_dtype(self.device, self.precision_of(manifest)))
        return dtype == f"torch.{manifest.execution.get('compute_dtype')}"


def reserved_device(execution: ExecutionConfig, *, num_weights: int, copies: int) -> torch.device:
    """The GPU that the job has reserved; the CPU where it has none, or where so many float32 copies do not fit there.

    A job without a reservation may run on a machine with GPUs, which are those of others.
    """
    if not execution.gpus_per_worker or not torch.cuda.is_available():
        return torch.device("cpu")
    needed, (free, _) = 4.0 * num_weights * copies, torch.cuda.mem_get_info(0)
    if needed > _SHARE_OF_MEMORY * free:
        logger.warning(
            "%d copies of %.3g float32 weights take %.1f GB, and the GPU has %.1f GB free: measured on the CPU",
            copies,
            num_weights,
            needed / 1e9,
            free / 1e9,
        )
        return torch.device("cpu")
    return torch.device("cuda", 0)
