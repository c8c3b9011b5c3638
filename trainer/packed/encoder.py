"""BERT's layers over packed examples, also under the names of its relatives.

Always holds: a layer is attention, then two products with an activation between them. After each of the two, what went
in is added, and a norm follows. The head reads the first token of each example. So the last layer computes no other
token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.compat import trained_module
from trainer.dropout.masks import Mask, dropped
from trainer.dropout.sites import draw_mask
from trainer.packed.attention import Attention, Layout
from trainer.packed.projections import Projection, is_joinable, widened


@dataclass(frozen=True)
class Modules:
    """The modules of a layer, in the order of execution. Dropout is installed before."""

    query: Any
    key: Any
    value: Any
    dropout_caller: Any
    """the module that calls dropout on attention's shares, as trainer/dropout/sites.py knows it"""
    share_dropout: Any
    attention_output: Any
    attention_dropout: Any
    """None: this family has none"""
    attention_norm: Any
    up: Any
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: Any
    output_dropout: Any
    output_norm: Any


def modules_of_bert(layer: Any) -> Modules:
    """Of BERT, RoBERTa, XLM-R, CamemBERT and ELECTRA."""
    attention = trained_module(layer.attention.self)  # dropout's sites are of the copy that trains
    return Modules(
        query=attention.query,
        key=attention.key,
        value=attention.value,
        dropout_caller=attention,
        share_dropout=attention.dropout,
        attention_output=layer.attention.output.dense,
        attention_dropout=layer.attention.output.dropout,
        attention_norm=layer.attention.output.LayerNorm,
        up=layer.intermediate.dense,
        activation=layer.intermediate.intermediate_act_fn,
        down=layer.output.dense,
        output_dropout=layer.output.dropout,
        output_norm=layer.output.LayerNorm,
    )


def modules_of_mpnet(layer: Any) -> Modules:
    """Of MPNet, whose dropout on attention's shares is a module of its own."""
    attention = layer.attention.attn
    return Modules(
        query=attention.q,
        key=attention.k,
        value=attention.v,
        dropout_caller=attention.dropout,
        share_dropout=attention.dropout,
        attention_output=attention.o,
        attention_dropout=layer.attention.dropout,
        attention_norm=layer.attention.LayerNorm,
        up=layer.intermediate.dense,
        activation=layer.intermediate.intermediate_act_fn,
        down=layer.output.dense,
        output_dropout=layer.output.dropout,
        output_norm=layer.output.LayerNorm,
    )


def modules_of_distilbert(layer: Any) -> Modules:
    """Of DistilBERT, which drops nothing of attention's output."""
    attention = trained_module(layer.attention)
    return Modules(
        query=attention.q_lin,
        key=attention.k_lin,
        value=attention.v_lin,
        dropout_caller=attention,
        share_dropout=attention.dropout,
        attention_output=attention.out_lin,
        attention_dropout=None,
        attention_norm=layer.sa_layer_norm,
        up=layer.ffn.lin1,
        activation=layer.ffn.activation,
        down=layer.ffn.lin2,
        output_dropout=layer.ffn.dropout,
        output_norm=layer.output_layer_norm,
    )


def embed(model: Any, inputs: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """The sum of the embeddings, normed, [T, H]; `positions` and each of `inputs` are [T]."""
    embeddings, ids = model.base_model.embeddings, inputs["input_ids"]
    x = embeddings.word_embeddings(ids)
    if hasattr(embeddings, "token_type_embeddings"):
        x = x + embeddings.token_type_embeddings(inputs.get("token_type_ids", torch.zeros_like(ids[:1])))
    x = x + embeddings.position_embeddings(positions)
    hidden: torch.Tensor = embeddings.dropout(embeddings.LayerNorm(x))
    return hidden


def encoder_layers(layers: Sequence[Any], modules_of: Callable[[Any], Modules], trains: bool) -> list[EncoderLayer]:
    """The packed layers of a model's layers; `modules_of` finds the modules of one."""
    return [EncoderLayer(modules_of(layer), layer is layers[-1], trains) for layer in layers]


class EncoderLayer:
    """One layer. The last one computes the first token of each example alone."""

    def __init__(self, modules: Modules, last: bool, trains: bool) -> None:
        self.modules, self.last = modules, last
        query, key, value = modules.query, modules.key, modules.value
        # whether no key and no value needs to be computed, see Attention.of_first
        self.reads_first = last and all(map(is_joinable, (query, key, value)))
        self.projection = Projection(query, *(() if self.reads_first else (key, value)), trains=trains)
        self.join = Projection(modules.attention_output, trains=trains)
        self.up = Projection(modules.up, trains=trains)
        self.down = Projection(modules.down, trains=trains)

    def __call__(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """[T, H] -> [T, H], or [B, 1, H] of the last layer."""
        attention = Attention(layout, (x.shape[-1] // layout.num_heads) ** -0.5, self._draw)
        first = x[layout.starts].unsqueeze(1) if self.last else x
        if self.reads_first:
            wide, (key, value) = widened(x, (self.modules.key, self.modules.value))
            attended = attention.of_first(self.projection(first), wide, key, value)
        else:
            attended = attention.of_all(self.projection(x))
            attended = attended[layout.starts].unsqueeze(1) if self.last else attended
        modules = self.modules
        x = _add_and_norm(self.join(attended), first, modules.attention_dropout, modules.attention_norm)
        down = self.down(modules.activation(self.up(x)))
        return _add_and_norm(down, x, modules.output_dropout, modules.output_norm)

    def _draw(self, shares: torch.Tensor, first: int) -> Mask | None:
        return draw_mask(shares, self.modules.share_dropout.p, self.modules.dropout_caller, first)


def _add_and_norm(x: torch.Tensor, residual: torch.Tensor, dropout: Any, norm: Any) -> torch.Tensor:
    """norm(residual + dropout(x)); a family may have no dropout here."""
    mask = draw_mask(x, dropout.p, dropout) if dropout is not None else None
    normed: torch.Tensor = norm(dropped(x, mask, residual))
    return normed
