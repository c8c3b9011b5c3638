"""model.quantization: frozen matrices of the backbone in 4 bits, through bitsandbytes, which is optional.

Always holds: the head and the adapter are not quantized, and neither is a pooler, which may be new. The numbers of a
matrix are those of bitsandbytes, in fp32, times the input in the type of autocast. NF4 is of QLoRA (Dettmers et al.,
arXiv 2305.14314).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from trainer.config.schema import PeftConfig
from trainer.errors import UserError, one_line
from trainer.model.peft_options import reads_weights


def check_quantization(model: PeftModel, settings: PeftConfig) -> None:
    """Refuses `model.quantization` for a model, an adapter or a machine that cannot train with it."""
    config: Any = model.get_base_model().config
    reason = None
    if settings.peft_type != "LORA" or reads_weights(settings):
        reason = "trains with peft.peft_type LORA alone, without use_dora and without starts that read the weights"
    elif settings.options.get("bias", "none") != "none" or settings.options.get("lora_bias"):
        reason = "trains no biases; leave peft.bias and peft.lora_bias out"
    elif any(isinstance(module, Conv1D) for module in model.modules()):
        reason = f"does not support {config.model_type}, whose layers are Conv1D"
    elif importlib.util.find_spec("bitsandbytes") is None:
        reason = "needs bitsandbytes, which is not installed: pip install bitsandbytes"
    elif error := _try_it():
        reason = f"needs a bitsandbytes that computes on this machine's CPU, where models are loaded: {error}"
    if reason:
        raise UserError(f"model.quantization: nf4 {reason}")


@functools.cache
def _try_it() -> str:
    """Why bitsandbytes cannot compute on the CPU; "" if it can."""
    try:
        from bitsandbytes.nn import Linear4bit

        Linear4bit(64, 2, quant_type="nf4").to("cpu")(torch.ones(1, 64))
    except Exception as error:  # without a library for the machine it raises many kinds
        return one_line(error)
    return ""


def loading_options(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize the layers of the backbone."""
    skipped = modules_kept_whole(config)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    return {"quantization_config": settings, "device_map": {"": "cpu"}}


def modules_kept_whole(config: PreTrainedConfig) -> list[str]:
    """Names of the modules that are not quantized: the head, and poolers."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
    head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    return head + [name for name, _ in model.named_modules() if "pool" in name]


def prepare_quantized(model: nn.Module) -> None:
    """Lets quantized layers compute in the type of autocast, from numbers in fp32; in place."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if is_quantized(module):
            module.weight.quant_state.dtype = torch.float32
            module.compute_type_is_set = True
            module.support_avx512bf16_for_cpu = False  # its format for evaluation has no gradient
            module.register_forward_pre_hook(_compute_as_autocast)


def _compute_as_autocast(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    (x,) = inputs
    kind = x.device.type
    x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
    module.compute_dtype = x.dtype
    return (x,)


def is_quantized(module: Any) -> bool:
    """Whether a module is a linear layer whose weight is not stored as numbers."""
    return isinstance(module, nn.Linear) and not module.weight.is_floating_point()
