"""Which backbones the packed forward computes: a family is one entry of `FAMILIES`.

Always holds: the packed forward knows a family only through the functions of its `Family`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    BertForSequenceClassification,
    CamembertForSequenceClassification,
    DistilBertForSequenceClassification,
    ElectraForSequenceClassification,
    LlamaForSequenceClassification,
    ModernBertForSequenceClassification,
    MPNetForSequenceClassification,
    Qwen2ForSequenceClassification,
    Qwen3ForSequenceClassification,
    RobertaForSequenceClassification,
    XLMRobertaForSequenceClassification,
)

from trainer.packed.attention import Layout, add_bias
from trainer.packed.encoder import embed, encoder_layers, modules_of_bert, modules_of_distilbert, modules_of_mpnet
from trainer.packed.prenorm import (
    PreNormLayer,
    modernbert_layers,
    modules_of_llama,
    prepare_llama,
    prepare_modernbert,
    why_not_rotary,
)

Layer = Callable[[torch.Tensor, Any], torch.Tensor]
"""[T, H] to [T, H], with what `Family.prepare` made; the last layer may give the tokens alone that the head reads"""


@dataclass(frozen=True)
class Family:
    """How the packed forward computes a family. Each function takes the classifier, without PEFT's outer wrapper."""

    embed: Callable[[Any, dict[str, torch.Tensor], Layout], torch.Tensor]
    """hidden states [T, H] before the first layer, from input_ids and perhaps token_type_ids, [T] each"""
    layers: Callable[[Any, bool], Sequence[Layer]]
    """its layers, built once per model; also takes whether the model trains"""
    classify: Callable[[Any, torch.Tensor, Any], torch.Tensor]
    """logits [B, C] from what the last layer gives and what `prepare` made"""
    prepare: Callable[[Any, dict[str, torch.Tensor], Layout], Any] = lambda model, inputs, layout: layout
    """what all layers of a micro-batch take beside hidden states, computed once: the layout, with a bias perhaps"""
    why_not: Callable[[Any], str | None] = lambda model: None
    """a reason against packing this model"""


def why_not_packed(model: PeftModel) -> str | None:
    """Why this model needs its own, padded forward; None where `PackedForward` can take its place."""
    backbone: Any = model.get_base_model()
    if type(backbone) not in FAMILIES:
        known = ", ".join(family.config_class.model_type for family in FAMILIES)  # type: ignore[attr-defined]
        return f"{backbone.config.model_type} is not among {known}"
    return FAMILIES[type(backbone)].why_not(backbone)


# --- BERT and its relatives ---


def embed_from_zero(model: Any, inputs: dict[str, torch.Tensor], layout: Layout) -> torch.Tensor:
    """BERT's positions begin at 0."""
    return embed(model, inputs, layout.positions)


def embed_from_padding(model: Any, inputs: dict[str, torch.Tensor], layout: Layout) -> torch.Tensor:
    """RoBERTa's positions begin behind the id of padding."""
    return embed(model, inputs, layout.positions + (model.base_model.embeddings.padding_idx + 1))


def why_not_bert(model: Any) -> str | None:
    """BERT's classes can also be decoders; an older configuration may have relative positions."""
    if model.config.is_decoder or model.config.add_cross_attention:
        return "this backbone is a decoder"
    positions = getattr(model.config, "position_embedding_type", "absolute")
    return None if positions == "absolute" else f"its positions are {positions}"


# --- ELECTRA and DistilBERT ---


def embed_electra(model: Any, inputs: dict[str, torch.Tensor], layout: Layout) -> torch.Tensor:
    """Embeddings may be narrower than hidden states."""
    x = embed_from_zero(model, inputs, layout)
    return model.base_model.embeddings_project(x) if hasattr(model.base_model, "embeddings_project") else x


def classify_distilbert(model: Any, x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The head is four modules of the model."""
    logits: torch.Tensor = model.classifier(model.dropout(model.pre_classifier(x[:, 0]).relu()))
    return logits


# --- MPNet ---


def add_mpnet_bias(model: Any, inputs: dict[str, torch.Tensor], layout: Layout) -> Layout:
    """The bias of a head and a relative position, the same in all layers."""
    longest = max(group.longest for group in layout.groups)
    one_example = torch.empty(1, longest, device=layout.starts.device)  # only its shape and device are read
    return add_bias(layout, model.base_model.encoder.compute_position_bias(one_example)[0])


def why_not_mpnet(model: Any) -> str | None:
    """Attention has no gradient for a bias, so the bias must be frozen."""
    trains = any(p.requires_grad for p in model.base_model.encoder.relative_attention_bias.parameters())
    return "its relative_attention_bias trains" if trains else None


BERT = Family(
    embed=embed_from_zero,
    layers=lambda model, trains: encoder_layers(model.base_model.encoder.layer, modules_of_bert, trains),
    classify=lambda model, x, layout: model.classifier(model.dropout(model.base_model.pooler(x))),
    why_not=why_not_bert,
)
ROBERTA = replace(BERT, embed=embed_from_padding, classify=lambda model, x, layout: model.classifier(x))
ELECTRA = replace(ROBERTA, embed=embed_electra)
DISTILBERT = Family(
    embed=embed_from_zero,
    layers=lambda model, trains: encoder_layers(model.base_model.transformer.layer, modules_of_distilbert, trains),
    classify=classify_distilbert,
)
MPNET = replace(
    ROBERTA,
    layers=lambda model, trains: encoder_layers(model.base_model.encoder.layer, modules_of_mpnet, trains),
    prepare=add_mpnet_bias,
    why_not=why_not_mpnet,
)
MODERNBERT = Family(
    embed=lambda model, inputs, layout: model.base_model.embeddings(inputs["input_ids"]),
    layers=modernbert_layers,
    classify=lambda model, x, prepared: model.classifier(
        model.drop(model.head(prepared.read(model.base_model.final_norm(x))))
    ),
    prepare=prepare_modernbert,
    why_not=why_not_rotary,
)
LLAMA = Family(
    embed=lambda model, inputs, layout: model.base_model.embed_tokens(inputs["input_ids"]),
    layers=lambda model, trains: [PreNormLayer(modules_of_llama(layer), trains) for layer in model.base_model.layers],
    classify=lambda model, x, prepared: model.score(prepared.read(model.base_model.norm(x))),
    prepare=prepare_llama,
    why_not=why_not_rotary,
)
FAMILIES: dict[type, Family] = {
    BertForSequenceClassification: BERT,
    RobertaForSequenceClassification: ROBERTA,
    XLMRobertaForSequenceClassification: ROBERTA,
    CamembertForSequenceClassification: ROBERTA,
    ElectraForSequenceClassification: ELECTRA,
    DistilBertForSequenceClassification: DISTILBERT,
    MPNetForSequenceClassification: MPNET,
    ModernBertForSequenceClassification: MODERNBERT,
    LlamaForSequenceClassification: LLAMA,
    Qwen2ForSequenceClassification: LLAMA,
    Qwen3ForSequenceClassification: LLAMA,
}
