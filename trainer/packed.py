"""The forward of BERT and RoBERTa without padding: the examples of a micro-batch end to end on one token axis [T, H].

Always holds: logits and gradients are those of the model's own forward over the padded examples, dropout included, up
to rounding. The model's own modules compute, PEFT's wrappers among them; only how tokens are laid out differs, and what
nothing reads is left out: the last layer queries, and feeds forward, for each example's first token alone, since the
head reads no other.

Unpadding before the embeddings follows ModernBERT (Warner et al., arXiv 2412.13663). Attention is computed by groups of
examples of like length, which are padded for it and for nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import BertForSequenceClassification, RobertaForSequenceClassification
from transformers import XLMRobertaForSequenceClassification as XLMRoberta

from trainer.dropout import DropoutKeys

ROBERTA = (RobertaForSequenceClassification, XLMRoberta)
# Examples attend together while the shortest has at least this share of the longest's tokens.
LIKE_LENGTH = 0.8


class Forward(Protocol):
    """How a model computes the logits of a batch."""

    @property
    def model(self) -> PeftModel: ...
    @property
    def packed(self) -> bool: ...
    def __call__(self, inputs: dict[str, torch.Tensor], lengths: np.ndarray) -> torch.Tensor: ...


@dataclass(frozen=True)
class PaddedForward:
    """The model's own forward, over padded examples."""

    model: PeftModel
    packed = False

    def __call__(self, inputs: dict[str, torch.Tensor], lengths: np.ndarray) -> torch.Tensor:
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

    packed = True

    def __init__(self, model: PeftModel, keys: DropoutKeys | None) -> None:
        """`keys`: what `dropout.install` gave for the model; None for a model that never trains."""
        self.model = model
        self._keys = keys
        classifier: Any = model.get_base_model()
        self._classifier, self._encoder = classifier, classifier.base_model
        # positions of RoBERTa start behind the padding id
        self._first_position = classifier.config.pad_token_id + 1 if type(classifier) in ROBERTA else 0
        *layers, last = [layer.attention.self for layer in self._encoder.encoder.layer]
        self._projections = [Projection((a.query, a.key, a.value)) for a in layers]
        self._projections.append(Projection((last.key, last.value)))

    def __call__(self, inputs: dict[str, torch.Tensor], lengths: np.ndarray) -> torch.Tensor:
        """Logits [B, C] of B examples whose tokens lie end to end.

        Args:
            inputs: input_ids and, where segments are told apart, token_type_ids; int64 [T] each.
            lengths: tokens of each example, on the host, int64 [B]; best in descending order.
        """
        layout = lay_out(lengths, inputs["input_ids"].device)
        x = self._embed(inputs, layout)
        *layers, last = zip(self._encoder.encoder.layer, self._projections, strict=True)
        for layer, projection in layers:
            attended = self._attend(layer.attention.self, projection(x), None, layout)
            x = _feed_forward(layer, attended, x)
        layer, projection = last
        x, first = projection(x), x[layout.starts].unsqueeze(1)
        attended = self._attend(layer.attention.self, x, layer.attention.self.query(first), layout)
        return self._classify(_feed_forward(layer, attended, first))

    def _embed(self, inputs: dict[str, torch.Tensor], layout: Layout) -> torch.Tensor:
        """[T, H]"""
        embeddings, ids = self._encoder.embeddings, inputs["input_ids"]
        segments = inputs.get("token_type_ids", torch.zeros_like(ids[:1]))
        x = embeddings.word_embeddings(ids) + embeddings.token_type_embeddings(segments)
        x = x + embeddings.position_embeddings(layout.positions + self._first_position)
        return embeddings.dropout(embeddings.LayerNorm(x))

    def _attend(
        self, attention: Any, projected: torch.Tensor, query: torch.Tensor | None, layout: Layout
    ) -> torch.Tensor:
        """What each token attends to, [T, H]; with a `query` of the first tokens [B, 1, H], what each of these does.

        `projected`: query, key and value of every token, [T, 3 H]; with a `query`, key and value.
        """
        if layout.tokens is not None:
            projected = _Gather.apply(projected, layout.tokens, layout.places)
        parts = projected.split([group.size * group.longest for group in layout.groups])
        outputs = []
        for group, part in zip(layout.groups, parts, strict=True):
            asking = None if query is None else query[group.first : group.first + group.size]
            outputs.append(self._attend_in_group(attention, part, asking, group))
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if query is None and layout.tokens is not None:
            joined = _Gather.apply(joined, layout.places, None)
        return joined if query is None else joined.unsqueeze(1)

    def _attend_in_group(
        self, attention: Any, projected: torch.Tensor, query: torch.Tensor | None, group: Group
    ) -> torch.Tensor:
        """Attention within each of G examples of N tokens: [G * N, H], or [G, H] for the one query of each."""
        shape = (group.size, -1, attention.num_attention_heads, attention.attention_head_size)
        *asking, key, value = projected.view(*shape[:1], group.longest, -1, *shape[2:]).permute(2, 0, 3, 1, 4).unbind()
        queries = asking[0] if query is None else query.view(shape).transpose(1, 2)
        by_head = [x.flatten(0, 1) for x in (queries, key, value)]  # [G * heads, N, head size]
        bias = group.bias.to(projected.dtype).expand(-1, attention.num_attention_heads, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(bias, by_head[0], by_head[1].transpose(1, 2), alpha=attention.scaling)
        shares = torch.softmax(scores, dim=-1)
        if attention.training and attention.dropout.p > 0 and self._keys is not None:
            units = shares.unflatten(0, (group.size, -1))
            shares = self._keys.drop(units, attention.dropout.p, attention, group.first).flatten(0, 1)
        attended = torch.bmm(shares.to(projected.dtype), by_head[2])
        return attended.unflatten(0, (group.size, -1)).transpose(1, 2).reshape(-1, attention.all_head_size)

    def _classify(self, first: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] from the first tokens [B, 1, H]."""
        head = self._classifier
        if type(head) in ROBERTA:
            return head.classifier(first)
        return head.classifier(head.dropout(self._encoder.pooler(first)))


class Projection:
    """Linear modules of one input in a single product: frozen ones, with plain LoRA or without; others one by one.

    The frozen weights become parts of one tensor, [outputs of all, H], so that they take no more memory than before.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self.modules = modules
        self.joined = all(_is_joinable(module) for module in modules)
        if self.joined:
            linears = [_base(module) for module in modules]
            self.sizes = [linear.out_features for linear in linears]
            self.weight = torch.cat([linear.weight.data for linear in linears])
            self.bias = torch.cat([linear.bias.data for linear in linears])
            parts = zip(linears, self.weight.split(self.sizes), self.bias.split(self.sizes), strict=True)
            for linear, weight, bias in parts:
                linear.weight.data, linear.bias.data = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of all modules side by side: [T, H] -> [T, outputs of all]."""
        if not self.joined:
            return torch.cat([module(x) for module in self.modules], dim=-1)
        if torch.is_autocast_enabled(x.device.type):  # once, not for each product
            x = x.to(self.weight.dtype)
        frozen = nn.functional.linear(x, self.weight, self.bias)
        low, back = [], []
        for position, module in enumerate(self.modules):
            if isinstance(module, LoraLinear):
                low.append(module.lora_A["default"](module.lora_dropout["default"](x)))
                before = sum(self.sizes[:position])
                up = module.lora_B["default"].weight * module.scaling["default"]
                back.append(nn.functional.pad(up, (0, 0, before, sum(self.sizes) - before - len(up))))
        if not low:
            return frozen
        return torch.addmm(frozen, torch.cat(low, dim=-1), torch.cat(back, dim=-1).t())


def _is_joinable(module: Any) -> bool:
    linear = _base(module)
    if type(linear) is not nn.Linear or linear.bias is None or any(p.requires_grad for p in linear.parameters()):
        return False
    return module is linear or (
        type(module) is LoraLinear
        and module.active_adapters == ["default"]
        and not (module.merged or module.disable_adapters or module.lora_variant or module.lora_bias["default"])
    )


def _base(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLinear) else module


def _feed_forward(layer: Any, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The rest of a layer, from what the tokens `x` attend to."""
    x = layer.attention.output(attended, x)
    return layer.output(layer.intermediate(x), x)


# --- where tokens lie -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """G examples of a micro-batch that attend together, padded to the longest of them."""

    first: int
    """number of its first example in the micro-batch"""
    size: int
    """G"""
    longest: int
    """tokens, N"""
    bias: torch.Tensor
    """added to the scores: 0, or minus infinity where a key is padding; fp32 [G, 1, 1, N]"""


@dataclass(frozen=True)
class Layout:
    """Where the T tokens of B examples lie. The places of all groups, padding included, are counted through."""

    groups: tuple[Group, ...]
    starts: torch.Tensor
    """first token of each example, int64 [B]"""
    positions: torch.Tensor
    """place of each token within its example, int64 [T]"""
    places: torch.Tensor
    """place of each token, int64 [T]"""
    tokens: torch.Tensor | None
    """token at each place, any at one of padding, int64 [places]; None where there is no padding"""


def lay_out(lengths: np.ndarray, device: torch.device) -> Layout:
    """The layout of examples of these lengths [B], on the device."""
    starts = np.cumsum(lengths) - lengths
    groups, tokens, places = [], [], []
    first, num_places = 0, 0
    while first < len(lengths):
        rest = lengths[first:]
        alike = np.minimum.accumulate(rest) >= LIKE_LENGTH * np.maximum.accumulate(rest)
        size = len(rest) if alike.all() else int(alike.argmin())
        longest = int(rest[:size].max())
        real = np.arange(longest) < rest[:size, None]
        tokens.append(np.where(real, starts[first : first + size, None] + np.arange(longest), 0).ravel())
        places.append(num_places + np.flatnonzero(real))
        bias = np.where(real, np.float32(0), np.float32(-np.inf))[:, None, None]
        groups.append(Group(first, size, longest, _on(device, bias)))
        first, num_places = first + size, num_places + size * longest
    return Layout(
        groups=tuple(groups),
        starts=_on(device, starts),
        positions=_on(device, np.arange(lengths.sum()) - np.repeat(starts, lengths)),
        places=_on(device, np.concatenate(places)),
        tokens=_on(device, np.concatenate(tokens)) if num_places > lengths.sum() else None,
    )


class _Gather(torch.autograd.Function):
    """x[index]; its gradient is gathered too where `back` says at which rows it lies, else put back row by row.

    With `back`, rows of x that are taken more than once (into padding, which is masked) get the gradient of one alone.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, back: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(index, back)
        ctx.num_rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        index, back = ctx.saved_tensors
        if back is not None:
            return gradient.index_select(0, back), None, None
        return gradient.new_zeros(ctx.num_rows, *gradient.shape[1:]).index_copy_(0, index, gradient), None, None


def _on(device: torch.device, array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
