"""Which backbones the packed forward computes: a family is one entry of `FAMILIES`.

Always holds: a family has BERT's layers. Its modules have the names that they have in transformers' BERT, from
`embeddings` to `encoder.layer[i].output`. What differs between families is in `Family`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    BertForSequenceClassification,
    RobertaForSequenceClassification,
    XLMRobertaForSequenceClassification,
)


@dataclass(frozen=True)
class Family:
    """What the packed forward must know of a family."""

    first_position: Callable[[Any], int]
    """from the configuration: the position of an example's first token"""
    classify: Callable[[Any, torch.Tensor], torch.Tensor]
    """logits [B, C] from the model and the last layer's first tokens [B, 1, H]"""


BERT = Family(lambda config: 0, lambda model, x: model.classifier(model.dropout(model.base_model.pooler(x))))
# RoBERTa's positions begin behind the id of padding
ROBERTA = Family(lambda config: int(config.pad_token_id) + 1, lambda model, x: model.classifier(x))
FAMILIES: dict[type, Family] = {
    BertForSequenceClassification: BERT,
    RobertaForSequenceClassification: ROBERTA,
    XLMRobertaForSequenceClassification: ROBERTA,
}


def why_not_packed(model: PeftModel) -> str | None:
    """Why this model needs its own, padded forward; None where `PackedForward` can take its place."""
    backbone = model.get_base_model()
    config: Any = backbone.config
    if type(backbone) not in FAMILIES:
        known = ", ".join(family.config_class.model_type for family in FAMILIES)  # type: ignore[attr-defined]
        return f"{config.model_type} is not among {known}"
    if config.is_decoder or config.add_cross_attention:
        return "this backbone is a decoder"
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return f"its positions are {config.position_embedding_type}"
    return None
