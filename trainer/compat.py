"""Private names of other libraries, one small function each, and what differs between devices.

Always holds: no other module of trainer/ touches a private name of a library (tests/contracts/test_private_names.py).
Checked with torch 2.11 and 2.13, transformers 5.17 and 5.23, peft 0.21.2, accelerate 1.15.
"""

from __future__ import annotations

import ctypes
import re
import resource
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedConfig

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

# --- transformers ---


def use_default_attention(config: PreTrainedConfig) -> None:
    """Lets the family choose its attention, whatever config.json was saved with (transformers 5.17, 5.23)."""
    config._attn_implementation = None


def layer_classes(model: Any) -> Collection[str]:
    """Class names of the layers that a model must not be split inside (transformers 5.17, 5.23)."""
    return set(getattr(model, "_no_split_modules", None) or ())


# --- PEFT: what it calls things inside a model ---


def path_in_model(name: str) -> str:
    """Path of a PEFT model's module in the model that PEFT wraps (peft 0.21.2)."""
    return name.removeprefix("base_model.model.")


def plain_owner(parameter: str) -> str:
    """Path of the module that a PEFT model's parameter belongs to, without PEFT's wrappers (peft 0.21.2).

    Example: base_model.model.encoder.query.lora_A.default.weight -> encoder.query
    """
    owner = path_in_model(parameter).rpartition(".")[0]
    return re.sub(r"\.(base_layer|original_module|modules_to_save\.default|\w+\.default)(?=\.|$)", "", owner)


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Tensors of adapter and head. With `bias: all`, PEFT 0.21.2 adds the head's frozen original and doubles biases."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    doubled = (".original_module.", ".modules_to_save.default.")
    return {name: tensor for name, tensor in state.items() if not any(part in name for part in doubled)}


# --- devices ---


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
