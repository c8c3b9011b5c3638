"""Private names of other libraries, one small function each, and what differs between devices.

Always holds: no other module of trainer/ touches a private name of a library (tests/contracts/test_private_names.py).
Checked with torch 2.11 and 2.13, transformers 5.17 and 5.23, peft 0.21.2, accelerate 1.15.
"""

from __future__ import annotations

import ctypes
import re
import resource
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

# --- torch ---

has_reordered_weights = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_fast_bf16() -> bool:
    """Whether this CPU has bf16 instructions (torch 2.11, 2.13)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def gradient_norms(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """The 2-norm of each tensor, in one kernel on a GPU (torch 2.11, 2.13)."""
    return list(torch._foreach_norm(gradients))


def softmax_backward(gradient: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Gradient of a softmax over the last axis with respect to its scores (torch 2.11, 2.13)."""
    scores: torch.Tensor = torch.ops.aten._softmax_backward_data(gradient, probabilities, -1, probabilities.dtype)
    return scores


def reorder_weight(weight: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A bf16 weight [O, H] in oneDNN's order for products with inputs of `num_rows` rows (torch 2.11, 2.13)."""
    reordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
    return reordered


def reordered_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x weight^T + bias, with a weight of `reorder_weight`: [..., H] -> [..., O] (torch 2.11, 2.13)."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


# --- accelerate ---


def forget_precision() -> None:
    """Lets the next Accelerator of this process have another precision (accelerate 1.15)."""
    AcceleratorState._reset_state()


# --- transformers ---


def can_replace_sdpa(model: PreTrainedModel) -> bool:
    """Whether attention goes through transformers' interface and is SDPA (transformers 5.17, 5.23)."""
    return bool(model._can_set_attn_implementation()) and model.config._attn_implementation == "sdpa"


def replace_sdpa(config: PreTrainedConfig, name: str) -> None:
    """Names another attention in the configuration of a layer that uses SDPA (transformers 5.17, 5.23)."""
    if config._attn_implementation == "sdpa":
        config._attn_implementation = name


def use_default_attention(config: PreTrainedConfig) -> None:
    """Lets the family choose its attention, whatever config.json was saved with (transformers 5.17, 5.23)."""
    config._attn_implementation = None


def checkpoint_layers(model: Any, checkpoint: Callable[..., Any]) -> None:
    """Calls each layer as `checkpoint(function, *inputs)` in training (transformers 5.17, 5.23)."""
    model._set_gradient_checkpointing(gradient_checkpointing_func=checkpoint)


class StoredTensor:
    """A tensor of a safetensors file, for transformers' loader: it reads by `tensor[...].to(...)` (5.17, 5.23).

    It is mapped from the file in its own type, by a mapping of its own. The memory is free as soon as it is copied.
    """

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name

    def __getitem__(self, index: Any) -> StoredTensor:
        return self

    def to(self, device: Any, dtype: torch.dtype) -> torch.Tensor:
        """As stored if that is a type that fp32 contains, else in `dtype`."""
        with safe_open(self.file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(self.name)
        return tensor if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor.to(dtype)


def layer_classes(model: Any) -> Collection[str]:
    """Class names of the layers that a model must not be split inside (transformers 5.17, 5.23)."""
    return set(getattr(model, "_no_split_modules", None) or ())


# --- PEFT: what it names things inside a model ---


def trained_module(module: Any) -> Any:
    """The copy that trains, if PEFT wraps the module to save it whole; else the module itself (peft 0.21.2)."""
    return module.modules_to_save["default"] if isinstance(module, ModulesToSaveWrapper) else module


def path_in_model(name: str) -> str:
    """Path of a PEFT model's module in the model that PEFT wraps (peft 0.21.2)."""
    return name.removeprefix("base_model.model.")


def plain_owner(parameter: str) -> str:
    """Path of the module that a PEFT model's parameter belongs to, without PEFT's wrappers (peft 0.21.2).

    Example: base_model.model.encoder.query.lora_A.default.weight -> encoder.query
    """
    owner = path_in_model(parameter).rpartition(".")[0]
    return re.sub(r"\.(base_layer|original_module|modules_to_save\.default|\w+\.default)(?=\.|$)", "", owner)


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """Tensors of adapter and head, or all that trains without an adapter.

    With `bias: all`, PEFT 0.21.2 adds the head's frozen original and doubles biases.
    """
    if not isinstance(model, PeftModel):
        return {path_in_model(name): p for name, p in model.named_parameters() if p.requires_grad}
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    doubled = (".original_module.", ".modules_to_save.default.")
    return {name: tensor for name, tensor in state.items() if not any(part in name for part in doubled)}


# --- devices ---


def keep_freed_memory() -> None:
    """Lets glibc keep up to 2 GiB of freed memory for the next tensors; other C libraries are left alone.

    The kernel would give it back page by page, filled with zeros. That takes 5 % of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device. The host does not wait until a GPU has copied it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: on a GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
