"""What the memory of a training is made of, measured and not estimated: the bytes of its tensors, and the peak that
PyTorch's allocator (on a GPU) or the kernel (on a CPU) counted.

Gradients exist between the backward pass and the step only, so the loop asks once in between. The price is one walk
over the parameters and one over the optimizer's state.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from stages.config.memory import TrainingMemory
from stages.train.engine import Engine

_STATUS = Path("/proc/self/status")
"""What the kernel says about this process."""


class MemoryMeter:
    """Make it before the models are loaded."""

    def __init__(self, device: torch.device, *, status: Path = _STATUS) -> None:
        self._device, self._status = device, status
        self._resident, self._peak_before = 0, 0
        self._gradients: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._resident, self._peak_before = resident("VmRSS", status), resident("VmHWM", status)

    def after_backward(self, engine: Engine) -> None:
        """Count the gradients, once; they are as large in every step."""
        if self._gradients is None:
            self._gradients = tensor_bytes(engine.held().gradients)

    def measured(self, engine: Engine) -> TrainingMemory:
        """Return what was found; ask after the last step, when the optimizer has its state."""
        held = engine.held()
        parts = {
            "parameters": tensor_bytes(held.parameters),
            "gradients": self._gradients or 0,
            "optimizer": tensor_bytes(held.optimizer),
            "frozen": tensor_bytes(held.frozen),
        }
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            # An optimizer may lie in the memory of the host (offloading): that is no part of the GPU's peak.
            elsewhere = tensor_bytes(one for one in (*held.parameters, *held.optimizer) if one.device.type != "cuda")
            rest = max(0, peak - sum(parts.values()) + elsewhere)
            return TrainingMemory(device="cuda", **parts, peak=peak, rest=rest)
        peak = resident("VmHWM", self._status)
        rest = None if peak <= self._peak_before else max(0, peak - self._resident - sum(parts.values()))
        return TrainingMemory(device="cpu", **parts, libraries=self._resident, peak=peak, rest=rest)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that this process holds for these tensors; tied weights and views of one storage count once."""
    storages = {}
    for tensor in tensors:
        local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
        storage = local.untyped_storage()
        storages[local.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident(name: str, status: Path = _STATUS) -> int:
    """Return `VmRSS`, what the process holds, or `VmHWM`, the most it ever held, in bytes; 0 where the kernel does not
    say."""
    try:
        lines = status.read_text().splitlines()
    except OSError:  # only Linux has it
        return 0
    found = next((line.split() for line in lines if line.startswith(f"{name}:")), None)
    return int(found[1]) * 1024 if found else 0
