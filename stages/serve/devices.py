"""Where models compute, and in which number format."""

import torch

from stages.config.errors import ConfigError
from stages.models.precision import compute_dtype

_SMALL = 30_000_000
"""Parameters. Below, the products of one token are over sooner than a second thread has begun."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def serving_device() -> torch.device:
    """The first GPU, or the CPU. This process is no worker of Ray's, which would know of a GPU of its own."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def use_threads(parameters: int, wanted: int = 0) -> int:
    """Set how many threads compute, and return it: by default one for a small model, else one a core."""
    if wanted or parameters < _SMALL:
        torch.set_num_threads(wanted or 1)
    return torch.get_num_threads()


def serving_dtype(name: str, device: torch.device) -> torch.dtype:
    """The format that a name stands for; `auto` is what the evaluation computes in: bfloat16 where a GPU multiplies it,
    float32 on a CPU, where half the bits are seldom faster and never as exact."""
    if name == "auto":
        return compute_dtype(device) if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ConfigError(
            f"--dtype={name!r} is no number format; allowed: auto, {', '.join(DTYPES)}", advice="Leave it out for auto."
        )
    return DTYPES[name]
