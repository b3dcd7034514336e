"""Which device this process computes on."""

import torch


def local_device() -> torch.device:
    """Return the GPU of this worker, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Ray Train shows a worker all GPUs of its machine, so index 0 may be another worker's; Ray knows which one is ours.
    from ray.train.torch import get_device

    device = get_device()
    return device if isinstance(device, torch.device) else device[0]
