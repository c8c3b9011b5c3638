"""Layers of ModernBERT, Llama, Qwen2 and Qwen3 over packed examples: pre-norm, with rotary positions and a gated MLP.

Always holds: a layer is attention, then a gated MLP. Each of the two reads a norm of the hidden states and adds to
them. Layers of one type share the tokens that attention sees and the angles of positions. So both are computed once
for a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.compat import trained_module
from trainer.dropout.masks import Mask, dropped
from trainer.dropout.sites import draw_mask
from trainer.packed.attention import Attention, Layout, Rotary, look_around, look_back
from trainer.packed.projections import Projection

# The angles of other types depend on the longest example of a batch (dynamic, longrope), or are not known here.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Seen:
    """What the layers of one type share in a micro-batch."""

    layout: Layout
    """with a bias for the tokens that attention sees"""
    rotary: Rotary


@dataclass(frozen=True)
class Prepared:
    """What all layers of a micro-batch and its head share."""

    by_type: Mapping[str, Seen]
    read: Callable[[torch.Tensor], torch.Tensor]
    """what the head reads of each example, [B, H], from the norm of what the last layer gives"""


@dataclass(frozen=True)
class Modules:
    """The modules of a layer, in the order of execution."""

    type: str
    """the key of `Prepared.by_type`"""
    attention_norm: Any
    projections: Sequence[Any]
    """to queries, keys and values, side by side"""
    head_norms: tuple[Any, Any] | None
    """of the heads of queries and of keys"""
    attention: Any
    """has `head_dim` and `attention_dropout`, and calls dropout on the shares"""
    attention_output: Any
    output_dropout: Any
    mlp_norm: Any
    gate: Sequence[Any]
    """to what is activated, and to its factor, side by side"""
    activation: Callable[[torch.Tensor], torch.Tensor]
    gate_dropout: Any
    down: Any


def modules_of_modernbert(layer: Any) -> Modules:
    """Of ModernBERT, which has one matrix for queries, keys and values, and one for the gate."""
    return Modules(
        type=layer.attention_type,
        attention_norm=layer.attn_norm,
        projections=[layer.attn.Wqkv],
        head_norms=None,
        attention=trained_module(layer.attn),  # dropout's sites are of the copy that trains
        attention_output=layer.attn.Wo,
        output_dropout=layer.attn.out_drop,
        mlp_norm=layer.mlp_norm,
        gate=[layer.mlp.Wi],
        activation=layer.mlp.act,
        gate_dropout=layer.mlp.drop,
        down=layer.mlp.Wo,
    )


def modules_of_llama(layer: Any) -> Modules:
    """Of Llama, Qwen2 and Qwen3. Qwen3 alone norms heads, and Llama alone has one type of layer."""
    attention = trained_module(layer.self_attn)
    return Modules(
        type=getattr(attention, "layer_type", "full_attention"),
        attention_norm=layer.input_layernorm,
        projections=[attention.q_proj, attention.k_proj, attention.v_proj],
        head_norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
        attention=attention,
        attention_output=attention.o_proj,
        output_dropout=nn.Identity(),
        mlp_norm=layer.post_attention_layernorm,
        gate=[layer.mlp.gate_proj, layer.mlp.up_proj],
        activation=layer.mlp.act_fn,
        gate_dropout=nn.Identity(),
        down=layer.mlp.down_proj,
    )


class PreNormLayer:
    """One layer. With `reads_first` it is the last one, and computes the first token of each example alone."""

    def __init__(self, modules: Modules, trains: bool, reads_first: bool = False) -> None:
        self.modules, self.reads_first = modules, reads_first
        self.projection = Projection(*modules.projections, trains=trains)
        self.join = Projection(modules.attention_output, trains=trains)
        self.gate = Projection(*modules.gate, trains=trains)
        self.down = Projection(modules.down, trains=trains)

    def __call__(self, x: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        """[T, H] -> [T, H], or [B, 1, H] of the first tokens."""
        modules, seen = self.modules, prepared.by_type[self.modules.type]
        projected = self.projection(modules.attention_norm(x))
        if modules.head_norms is not None:
            projected = _norm_heads(projected, *modules.head_norms, seen.layout)
        attention = Attention(seen.layout, modules.attention.head_dim**-0.5, self._draw, seen.rotary)
        attended = attention.of_all(projected)
        if self.reads_first:
            x, attended = (each[seen.layout.starts].unsqueeze(1) for each in (x, attended))
        output = self.join(attended)
        mask = draw_mask(output, getattr(modules.output_dropout, "p", 0.0), modules.output_dropout)
        x = dropped(output, mask, x)
        activated, factor = self.gate(modules.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(modules.gate_dropout(modules.activation(activated) * factor))

    def _draw(self, shares: torch.Tensor, first: int) -> Mask | None:
        return draw_mask(shares, self.modules.attention.attention_dropout, self.modules.attention, first)


def _norm_heads(projected: torch.Tensor, query_norm: Any, key_norm: Any, layout: Layout) -> torch.Tensor:
    """Norms each head of queries and of keys, in [T, all heads * D]."""
    heads = (layout.num_heads, layout.num_key_heads, layout.num_key_heads)
    queries, keys, values = projected.unflatten(-1, (sum(heads), -1)).split(heads, dim=1)
    normed = [query_norm(queries).to(values.dtype), key_norm(keys).to(values.dtype), values]
    return torch.cat(normed, dim=1).flatten(1)


def modernbert_layers(model: Any, trains: bool) -> list[PreNormLayer]:
    """The last one computes no more than the head reads."""
    layers, reads_first = model.base_model.layers, model.config.classifier_pooling == "cls"
    return [PreNormLayer(modules_of_modernbert(layer), trains, reads_first and layer is layers[-1]) for layer in layers]


# --- what the layers of a micro-batch share ---


def prepare_modernbert(model: Any, inputs: dict[str, torch.Tensor], layout: Layout) -> Prepared:
    """Attention is to all tokens, or to those around a token. The head reads the mean or the first token."""
    config, by_type = model.config, {}
    for kind in set(config.layer_types):
        seen = look_around(layout, config.sliding_window) if kind == "sliding_attention" else layout
        # its code rounds queries and keys to fp32, even in fp64
        by_type[kind] = Seen(seen, _rotary(model, layout, kind, rounds_to=torch.float32))
    if config.classifier_pooling == "mean":
        lengths = layout.lengths.tolist()
        return Prepared(by_type, lambda x: torch.stack([own.mean(dim=0) for own in x.split(lengths)]))
    return Prepared(by_type, lambda x: x.squeeze(1))


def prepare_llama(model: Any, inputs: dict[str, torch.Tensor], layout: Layout) -> Prepared:
    """Attention is to the tokens before a token, perhaps within a window. The head reads the last token.

    As in transformers, the last token is the last one whose id is not that of padding.
    """
    rotary, ids = _rotary(model, layout), inputs["input_ids"]
    windows = {"full_attention": None, "sliding_attention": getattr(model.config, "sliding_window", None)}
    # Llama has one type, whatever it names, and may name none
    types = {"full_attention", *(getattr(model.config, "layer_types", None) or ())} & windows.keys()
    places = torch.arange(len(ids), device=ids.device).masked_fill(ids == model.config.pad_token_id, 0)
    example = (layout.positions == 0).cumsum(dim=0) - 1
    last = layout.starts.scatter_reduce(0, example, places, "amax")
    return Prepared({kind: Seen(look_back(layout, windows[kind]), rotary) for kind in types}, lambda x: x[last])


def _rotary(model: Any, layout: Layout, *kind: str, rounds_to: torch.dtype | None = None) -> Rotary:
    """The angles of all positions, by the model's own code; `kind` is the type of layer, if it matters."""
    positions = torch.arange(max(group.longest for group in layout.groups), device=layout.starts.device)
    dtype = torch.promote_types(layout.groups[0].bias.dtype, torch.float32)
    like = torch.empty((), dtype=dtype, device=positions.device)  # only its type and device are read
    cos, sin = model.base_model.rotary_emb(like, positions.unsqueeze(0), *kind)
    return Rotary(cos[0], sin[0], rounds_to)


def why_not_rotary(model: Any) -> str | None:
    """A type of rotary positions whose angles are not known to depend on the position alone."""
    parameters = model.config.rope_parameters
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    for kind in (own["rope_type"] for own in each if "rope_type" in own):
        if kind not in ROPE_TYPES:
            return f"its rotary positions are {kind}, which are not among {', '.join(ROPE_TYPES)}"
    return None
