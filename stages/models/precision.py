"""In which number format matrix products are computed: bfloat16 only where the hardware multiplies it.

A CPU without bfloat16 instructions emulates them many times slower than float32 (13 times on AVX2). `precision=bf16`
asks for at least bfloat16, so there it is float32: faster, and never less exact.
"""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

_CPU_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def compute_dtype(device: torch.device, precision: str = "bf16") -> torch.dtype:
    """Return the number format that `precision` stands for on this device."""
    if precision == "fp16":
        return torch.float16
    return torch.bfloat16 if precision == "bf16" and multiplies_bfloat16(device.type) else torch.float32


@cache
def multiplies_bfloat16(device_type: str) -> bool:
    """True when the device has instructions for products of bfloat16; logged once when it has none."""
    if device_type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = names_bfloat16(torch.cpu.get_capabilities())
    if not has:
        logger.info("this %s has no bfloat16 instructions: precision=bf16 is computed in float32", device_type)
    return has


def names_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """True when one of the instruction sets that the CPU has multiplies bfloat16."""
    return any(capabilities.get(name, False) for name in _CPU_INSTRUCTIONS)


def autocast(device: torch.device, precision: str = "bf16") -> torch.autocast:
    """Context in which matrix products are computed as `precision` says."""
    dtype = compute_dtype(device, precision)
    low = dtype is not torch.float32
    return torch.autocast(device.type, dtype=dtype if low else torch.bfloat16, enabled=low)
