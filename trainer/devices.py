"""Where tensors live: getting them there, and how much of it they take."""

from __future__ import annotations

import resource

import numpy as np
import torch


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device; the host does not wait until a GPU has taken it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: on the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
