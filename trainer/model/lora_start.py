"""Starts of LoRA that read the backbone or the data: PiSSA, OLoRA and EVA.

Always holds: the saved adapter is plain LoRA on the unchanged backbone. PiSSA (Meng et al., arXiv 2404.02948) and OLoRA
(Büyükakyüz, arXiv 2406.01775) move a part of each weight into the adapter: W becomes W - s B0 A0. So what was learned
is s (B A - B0 A0), which is LoRA of twice the rank. EVA (Paischer et al., arXiv 2410.07170) leaves the weights alone.
It starts A at the main directions of each layer's inputs, and divides the ranks among the layers.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.config.schema import PeftConfig
from trainer.errors import UserError, one_line

BACKBONE_STARTS = ("pissa", "olora")
"""how values of peft.init_lora_weights begin that move a part of the backbone into the adapter"""
MAX_EVA_BATCHES = 1000
"""EVA's directions have settled after a few dozens"""


def start_of(settings: PeftConfig) -> str:
    """peft.init_lora_weights if it is a name; else ""."""
    value = settings.options.get("init_lora_weights")
    return value if isinstance(value, str) else ""


def changes_backbone(settings: PeftConfig) -> bool:
    """Whether the start moves a part of the backbone's weights into the adapter."""
    return start_of(settings).startswith(BACKBONE_STARTS)


def check_start(settings: PeftConfig, layers: Mapping[str, Any]) -> None:
    """Refuses a start for layers that it does not fit; `layers` are those with an adapter, by name."""
    start = start_of(settings)
    if not (changes_backbone(settings) or start == "eva"):
        return
    for name, layer in layers.items():
        base, short = layer.get_base_layer(), name.rpartition(".")[2]
        if start == "olora" and isinstance(base, Conv1D):
            raise UserError(f"peft.init_lora_weights: olora does not fit Conv1D layers such as {short}; use pissa")
        if isinstance(base, nn.Embedding):
            if changes_backbone(settings):
                raise UserError(f"peft.init_lora_weights: {start} does not fit embeddings such as {short}; use true")
            continue
        inputs, outputs = layer.in_features, layer.out_features
        most, rank = min(inputs, outputs), layer.r["default"]
        if start == "eva":
            most, rank = inputs, round(rank * _find_rho(settings))
        if rank > most:
            raise UserError(
                f"peft.r: {start} needs {rank} directions of {name}, which has {most}; use a lower rank, or "
                "peft.init_lora_weights true"
            )


def _find_rho(settings: PeftConfig) -> float:
    """How many times its rank a layer may get by EVA."""
    given, default = settings.options.get("eva_config") or {}, peft.EvaConfig().rho
    return float(given.get("rho", default) if isinstance(given, dict) else given.rho)


def start_from_data(
    model: PeftModel, batches: list[dict[str, torch.Tensor]], max_batches: int = MAX_EVA_BATCHES
) -> None:
    """Starts the adapter by EVA, in place, from the inputs of these batches: input_ids and attention_mask, [B, L].

    PEFT takes the batches in turn until the directions settle.

    Raises:
        UserError: they have not settled after `max_batches`.
    """
    count = 0

    def compute(model: PeftModel, inputs: dict[str, torch.Tensor]) -> Any:
        nonlocal count
        count += 1
        if count > max_batches:
            raise UserError(
                f"peft.init_lora_weights: eva does not settle in {max_batches:,} batches; try a lower peft.r"
            )
        return model(**inputs)

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a line for each layer and small batch
            initialize_lora_eva_weights(
                model, batches, forward_fn=compute, gather_distributed_inputs=False, show_progress_bar=False
            )
    except (ValueError, IndexError) as error:  # at layers that do not see every token, such as a pooler
        fix = "leave poolers out of peft.target_modules, or use another start"
        raise UserError(
            f"peft.init_lora_weights: eva cannot read a layer's inputs ({one_line(error)}); {fix}"
        ) from None
    model.peft_config["default"].init_lora_weights = True  # type: ignore[attr-defined]


def as_plain_lora(
    config: Any, tensors: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Turns an adapter that took a part of the backbone into LoRA on the unchanged backbone.

    Args:
        config: PEFT's configuration of the adapter.
        tensors: adapter and head as trained.
        start: the same before step 1.

    Returns:
        configuration and tensors of twice the rank: [A; A0] and [B, -B0], with the same scale.
    """
    config, plain = copy.deepcopy(config), dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            plain[name] = torch.cat([tensor, start[name]])
        elif name.endswith(".lora_B.weight"):
            plain[name] = torch.cat([tensor, -start[name]], dim=1)
    # the scale is alpha / r, and alpha / sqrt(r) with rsLoRA
    factor = 2**0.5 if config.use_rslora else 2
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, factor * config.lora_alpha, True
    config.rank_pattern = {name: 2 * r for name, r in config.rank_pattern.items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}
    return config, plain
