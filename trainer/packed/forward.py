"""The forward of BERT and RoBERTa without padding: the examples of a micro-batch end to end on one token axis [T, H].

Always holds: logits and gradients are those of the model's own forward over the padded examples, dropout included, up
to rounding. The model's own modules compute, PEFT's wrappers among them, but for frozen products (products.py),
attention (attention.py) and, on a CPU, what kernels.py has compiled. What nothing reads is left out: the last layer
queries, and feeds forward, for each example's first token alone, since the head reads no other; where it may, it makes
no keys and values either.

Unpadding before the embeddings follows ModernBERT (Warner et al., arXiv 2412.13663).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import BertForSequenceClassification, RobertaForSequenceClassification
from transformers import XLMRobertaForSequenceClassification as XLMRoberta

from trainer.dropout.kernels import Kernels
from trainer.dropout.masks import Mask
from trainer.dropout.sites import DropoutKeys, KeyedDropout
from trainer.packed.attention import Attention, CompiledAttention, Layout, lay_out
from trainer.packed.projections import Projection, is_joinable, widened

ROBERTA = (RobertaForSequenceClassification, XLMRoberta)


@dataclass(frozen=True)
class Padding:
    """How the examples of this model may share a batch; see start_check.py."""

    left: bool = False
    """padding comes before the tokens of an example"""
    one_length: bool = False
    """examples of one length only, since this model's logits depend on padding"""
    packs: bool = True
    """packed examples give the same logits, where `why_not_packed` knows of no reason"""


class Forward(Protocol):
    """How a model computes the logits of a batch."""

    @property
    def model(self) -> PeftModel: ...
    @property
    def packed(self) -> bool: ...
    @property
    def padding(self) -> Padding: ...
    def __call__(
        self, inputs: dict[str, torch.Tensor], lengths: np.ndarray, layout: Layout | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class PaddedForward:
    """The model's own forward, over padded examples."""

    model: PeftModel
    padding: Padding = Padding()
    packed = False

    def __call__(
        self, inputs: dict[str, torch.Tensor], lengths: np.ndarray, layout: Layout | None = None
    ) -> torch.Tensor:
        """Logits [B, C]; `inputs` as the model takes them, [B, L] each."""
        return self.model(**inputs).logits


def why_not_packed(model: PeftModel) -> str | None:
    """Why this model needs its own, padded forward; None where `PackedForward` can take its place."""
    backbone = model.get_base_model()
    config: Any = backbone.config
    if type(backbone) not in (BertForSequenceClassification, *ROBERTA):
        return f"{config.model_type} is not among bert, roberta, xlm-roberta"
    if config.is_decoder or config.add_cross_attention:
        return "this backbone is a decoder"
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return f"its positions are {config.position_embedding_type}"
    return None


class PackedForward:
    """Logits of packed examples, by the modules of a model for which `why_not_packed` is None."""

    packed, padding = True, Padding()

    def __init__(self, model: PeftModel, keys: DropoutKeys | None, kernels: Kernels | None = None) -> None:
        """`keys`: what `dropout.install` gave for the model; None for a model that never trains.

        `kernels` do what they can of work in bf16 on a CPU.
        """
        self.model = model
        self._keys = keys
        classifier: Any = model.get_base_model()
        self._classifier, self._encoder = classifier, classifier.base_model
        self._dtype = classifier.dtype
        # positions of RoBERTa start behind the padding id
        self._first_position = classifier.config.pad_token_id + 1 if type(classifier) in ROBERTA else 0
        layers = self._encoder.encoder.layer
        self._layers = [_Layer(layer, layer is layers[-1], keys, kernels) for layer in layers]

    def __call__(
        self, inputs: dict[str, torch.Tensor], lengths: np.ndarray, layout: Layout | None = None
    ) -> torch.Tensor:
        """Logits [B, C] of B examples whose tokens lie end to end.

        Args:
            inputs: input_ids and, where segments are told apart, token_type_ids; int64 [T] each.
            lengths: tokens of each example, on the host, int64 [B]; best in descending order.
            layout: what `lay_out` gives for them, if it is at hand.
        """
        layout = layout or self.lay_out(lengths, inputs["input_ids"].device)
        x = _Hidden(self._embed(inputs, layout))
        for layer in self._layers:
            x = layer(x, layout)
        head = self._classifier
        if type(head) in ROBERTA:
            logits: torch.Tensor = head.classifier(x.wide)
        else:
            logits = head.classifier(head.dropout(self._encoder.pooler(x.wide)))
        return logits

    def lay_out(self, lengths: np.ndarray, device: torch.device, longest: int | None = None) -> Layout:
        """Where the tokens of examples of these lengths lie; see `attention.lay_out`."""
        computes_in = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self._dtype
        return lay_out(lengths, self._classifier.config.num_attention_heads, device, computes_in, longest)

    def _embed(self, inputs: dict[str, torch.Tensor], layout: Layout) -> torch.Tensor:
        """[T, H]"""
        embeddings, ids = self._encoder.embeddings, inputs["input_ids"]
        segments = inputs.get("token_type_ids", torch.zeros_like(ids[:1]))
        x = embeddings.word_embeddings(ids) + embeddings.token_type_embeddings(segments)
        x = x + embeddings.position_embeddings(layout.positions + self._first_position)
        hidden: torch.Tensor = embeddings.dropout(embeddings.LayerNorm(x))
        return hidden


@dataclass(frozen=True)
class _Hidden:
    """What goes from layer to layer, [T, H] or, of first tokens alone, [B, 1, H]."""

    wide: torch.Tensor
    """as LayerNorm gives it"""
    narrow: torch.Tensor | None = None
    """the same in the type of products, where that is at hand"""

    def for_products(self) -> torch.Tensor:
        return self.wide if self.narrow is None else self.narrow


class _Layer:
    """One layer; the last one gives the first token of each example."""

    def __init__(self, layer: Any, last: bool, keys: DropoutKeys | None, kernels: Kernels | None) -> None:
        """`keys` draw the masks of attention."""
        self.attention: Any = layer.attention.self
        if isinstance(self.attention, ModulesToSaveWrapper):  # the keys know the copy that trains
            self.attention = self.attention.modules_to_save["default"]
        self.attention_output = layer.attention.output
        self.intermediate, self.output = layer.intermediate, layer.output
        query, key, value = self.attention.query, self.attention.key, self.attention.value
        self.last, self.keys, self.kernels = last, keys, kernels
        # whether a key and a value need not be made of each token, see Attention.of_first
        self.reads_first = last and all(map(is_joinable, (query, key, value)))
        trains = keys is not None
        self.projection = Projection(query, *(() if self.reads_first else (key, value)), trains=trains)
        self.join = Projection(self.attention_output.dense, trains=trains)
        self.up = Projection(self.intermediate.dense, trains=trains)
        self.down = Projection(self.output.dense, trains=trains)

    def __call__(self, x: _Hidden, layout: Layout) -> _Hidden:
        attention = self.attention
        first = _Hidden(x.wide[layout.starts].unsqueeze(1)) if self.last else x
        if self.reads_first:
            attend = Attention(layout, attention.num_attention_heads, attention.scaling, self._draw)
            wide, (key, value) = widened(x.for_products(), (attention.key, attention.value))
            attended = attend.of_first(self.projection(first.wide), wide, key, value)
        else:
            attended = self._attended(self.projection(self._input_of(self.projection, x)), layout)
            attended = attended[layout.starts].unsqueeze(1) if self.last else attended
        x = self._add_and_norm(self.attention_output, self.join(attended), first.wide)
        up = self.up(self._input_of(self.up, x))
        return self._add_and_norm(self.output, self.down(self.intermediate.intermediate_act_fn(up)), x.wide)

    @staticmethod
    def _input_of(projection: Projection, x: _Hidden) -> torch.Tensor:
        return x.for_products() if projection.joined else x.wide  # modules of other kinds may not only multiply

    def _draws(self) -> bool:
        return self.keys is not None and self.attention.training and self.attention.dropout.p > 0

    def _draw(self, shares: torch.Tensor, first: int) -> Mask | None:
        if self.keys is None or not self._draws():
            return None
        return self.keys.mask(shares, self.attention.dropout.p, self.attention, first)

    def _attended(self, projected: torch.Tensor, layout: Layout) -> torch.Tensor:
        """[T, 3 H] -> [T, H]"""
        attention = self.attention
        num_heads = attention.num_attention_heads
        if self.kernels is None or not self.kernels.take_heads(projected, num_heads):
            return Attention(layout, num_heads, attention.scaling, self._draw).of_all(projected)
        units = self.keys.units(attention.dropout.p, attention) if self.keys is not None and self._draws() else None
        attended: torch.Tensor = CompiledAttention.apply(
            projected, layout.spans, num_heads, attention.scaling, units, self.kernels
        )
        return attended

    def _add_and_norm(self, module: Any, x: torch.Tensor, residual: torch.Tensor) -> _Hidden:
        """LayerNorm(residual + dropout(x))"""
        dropout, norm = module.dropout, module.LayerNorm
        if not isinstance(dropout, KeyedDropout):
            return _Hidden(norm(dropout(x) + residual))
        if self.kernels is None or not self.kernels.take_rows(x) or not _is_frozen_and_fp32(norm):
            return _Hidden(norm(dropout.add(x, residual)))
        return _Hidden(*_CompiledNorm.apply(x, residual.float(), norm, dropout.mask(x), self.kernels))


def _is_frozen_and_fp32(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and all(
        tensor is not None and not tensor.requires_grad and tensor.dtype == torch.float32
        for tensor in (norm.weight, norm.bias)
    )


class _CompiledNorm(torch.autograd.Function):
    """A frozen LayerNorm of residual + dropout(x), as it is and in the type of x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, norm: nn.LayerNorm, mask: Mask | None, kernels: Kernels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keep, scale = (mask.keep, mask.scale) if mask is not None else (None, 1.0)
        y, narrow, *saved = kernels.add_norm(x, residual, norm, keep, scale, trains=any(ctx.needs_input_grad))
        ctx.save_for_backward(*saved)
        ctx.how, ctx.kernels = (norm, keep, scale), kernels
        ctx.set_materialize_grads(False)
        return y, narrow

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        of_y, of_narrow = (gradient if gradient is None else gradient.contiguous() for gradient in gradients)
        of_residual, of_x = ctx.kernels.add_norm_backward(of_y, of_narrow, *ctx.saved_tensors, *ctx.how)
        return of_x, of_residual, None, None, None
