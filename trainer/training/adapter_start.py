"""Starts an adapter as peft.init_lora_weights says, where PEFT needs the data, or changes the backbone.

Always holds: every rank and every resume has the same start. The ranks compare it.
"""

from __future__ import annotations

import hashlib

import numpy as np
import safetensors.torch
import torch
from peft import PeftModel

from trainer.batching.collate import collate_padded
from trainer.batching.plan import split_by_tokens
from trainer.config.schema import PeftConfig
from trainer.distributed.session import check_agreement
from trainer.model.adapter import adapter_tensors
from trainer.model.lora_start import changes_backbone, start_from_data, start_of
from trainer.model.peft_options import check_parameter_budget
from trainer.training.records import Inputs

EVA_EXAMPLES, EVA_TOKENS = 512, 2048
"""rows of train, spread evenly, that EVA sees; and tokens of a batch"""


def start_adapter(
    model: PeftModel, settings: PeftConfig, inputs: Inputs
) -> tuple[dict[str, torch.Tensor] | None, list[str]]:
    """Ends what `peft.init_lora_weights` begins; returns `Learner.start`, and notes for the user."""
    if start_of(settings) == "eva":
        train, num_rows = inputs.examples["train"], min(EVA_EXAMPLES, len(inputs.examples["train"].lengths))
        chosen = np.linspace(0, len(train.lengths) - 1, num_rows).round().astype(np.int64)
        split = split_by_tokens(train.lengths[chosen], EVA_TOKENS, window_length=train.window_length)
        parts = [chosen[part] for part in split]
        padding = {"pad_token_id": inputs.backbone.tokenizer.pad_token_id, "left": False}
        batches = [collate_padded(train, part, np.ones(len(part)), torch.device("cpu"), **padding) for part in parts]
        start_from_data(model, [batch.inputs for batch in batches])
        check_parameter_budget(model, settings)  # layers of other sizes got the ranks
        notes = [f"eva started the adapter from {num_rows:,} rows of train"]
    elif changes_backbone(settings):
        rank = 2 * model.peft_config["default"].r  # type: ignore[attr-defined]
        notes = [f"the saved adapter has rank {rank}, twice peft.r: then it is plain LoRA on the unchanged backbone"]
    else:
        return None, []
    start = adapter_tensors(model)
    check_agreement({"peft.init_lora_weights": hashlib.sha256(safetensors.torch.save(start)).hexdigest()})
    return start if changes_backbone(settings) else None, notes
