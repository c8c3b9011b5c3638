"""Where tensors live: getting them there, keeping the place for the next ones, and how much of it they take."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable

import numpy as np
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Has the C library keep memory that is freed for what is asked for next; up to 2 GiB, and glibc alone can.

    From the kernel it would come back page by page and set to zero, which takes a twentieth of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device; the host does not wait until a GPU has taken it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def on_host(tensor: torch.Tensor) -> Callable[[], list[float]]:
    """What gives the numbers [n]; the host waits for a GPU when it calls this, and no longer than for these."""
    if tensor.device.type != "cuda":
        return tensor.tolist
    copy, copied = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def numbers() -> list[float]:
        copied.synchronize()
        found: list[float] = copy.tolist()
        return found

    return numbers


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: on the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
