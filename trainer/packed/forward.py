"""The forward without padding: the examples of a micro-batch end to end on one token axis [T, H].

Always holds: logits and gradients are those of the model's own forward over the padded examples, dropout included, up
to rounding. The model's own modules compute, PEFT's wrappers too. Only frozen products (projections.py) and attention
(attention.py) are ours. What differs between families is in families.py.

Unpadding before the embeddings follows ModernBERT (Warner et al., arXiv 2412.13663).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel

from trainer.batching.collate import Batch, collate_packed, collate_padded
from trainer.data.tokens import Examples
from trainer.errors import UserError
from trainer.packed.attention import lay_out
from trainer.packed.families import FAMILIES, why_not_packed


@dataclass(frozen=True)
class Padding:
    """How the examples of this model may share a batch; see start_check.py."""

    left: bool = False
    """padding comes before the tokens of an example"""
    one_length: bool = False
    """examples of one length only, since this model's logits depend on padding"""
    packs: bool = True
    """packed examples have the same logits, where `why_not_packed` knows of no reason"""


@dataclass(frozen=True)
class PaddedForward:
    """The model's own forward, over padded examples."""

    model: PeftModel
    pad_token_id: int
    padding: Padding = Padding()
    padded_because: str = ""
    """why examples are not packed, for the user"""
    packed = False

    def collate(self, examples: Examples, ids: np.ndarray, weights: np.ndarray, device: torch.device) -> Batch:
        """Puts the examples `ids` [B] on the device, padded."""
        return collate_padded(examples, ids, weights, device, self.pad_token_id, self.padding.left)

    def __call__(self, inputs: dict[str, torch.Tensor], lengths: np.ndarray) -> torch.Tensor:
        """Logits [W, C] of W windows; `inputs` as the model takes them, [W, L] each."""
        return self.model(**inputs).logits


def check_packed(packed: Literal["auto"] | bool, reason: str | None) -> None:
    """Refuses `model.packed: true` where there is a reason against it."""
    if packed is True and reason:
        raise UserError(f"model.packed: true is not supported here: {reason}. Use auto to fall back to padding")


def build_forward(
    model: PeftModel,
    pad_token_id: int,
    packed: Literal["auto"] | bool,
    padding: Padding,
    sharded: bool = False,
    checkpoint: Callable[..., Any] | None = None,
) -> Forward:
    """The packed forward, or the padded one if the user chose it by `packed` (model.packed) or there is a reason.

    `sharded`: whether the frozen weights are. `checkpoint` calls each packed layer in training, see `DropoutKeys`.
    Raises a UserError if packing is required and not supported.
    """
    reason = "the frozen weights are sharded" if sharded else why_not_packed(model)
    reason = reason or (None if padding.packs else "packed examples give other logits")
    check_packed(packed, reason)
    if packed is False or reason:
        return PaddedForward(model, pad_token_id, padding, reason or "model.packed is false")
    return PackedForward(model, checkpoint)


class PackedForward:
    """Logits of packed examples, by the modules of a model for which `why_not_packed` is None."""

    packed, padding, padded_because = True, Padding(), ""

    def __init__(self, model: PeftModel, checkpoint: Callable[..., Any] | None = None) -> None:
        """The model does not train if none of its parameters requires a gradient. Its dropout is installed before."""
        self.model, self._checkpoint = model, checkpoint
        self._classifier: Any = model.get_base_model()
        self._family = FAMILIES[type(self._classifier)]
        self._layers = self._family.layers(self._classifier, any(p.requires_grad for p in model.parameters()))

    def collate(self, examples: Examples, ids: np.ndarray, weights: np.ndarray, device: torch.device) -> Batch:
        """Puts the examples `ids` [B] on the device, packed."""
        return collate_packed(examples, ids, weights, device)

    def __call__(self, inputs: dict[str, torch.Tensor], lengths: np.ndarray) -> torch.Tensor:
        """Logits [W, C] of W windows whose tokens lie end to end; `lengths` are best in descending order.

        `inputs` are input_ids and, where segments are told apart, token_type_ids; int64 [T] each.
        """
        device, model = inputs["input_ids"].device, self._classifier
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
        num_key_heads = getattr(model.config, "num_key_value_heads", None)
        layout = lay_out(lengths, model.config.num_attention_heads, device, dtype, num_key_heads)
        x = self._family.embed(model, inputs, layout)
        prepared = self._family.prepare(model, inputs, layout)
        checkpoint = self._checkpoint if torch.is_grad_enabled() else None
        for layer in self._layers:
            x = layer(x, prepared) if checkpoint is None else checkpoint(layer, x, prepared)
        return self._family.classify(model, x, prepared)


Forward = PackedForward | PaddedForward
