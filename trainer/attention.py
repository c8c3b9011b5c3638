"""Attention among the tokens of each example, where the examples of a micro-batch lie end to end on one token axis.

Examples of like length attend together, as a *group*, padded for that to the longest of them and for nothing else.
Products, dropout and the way there and back are one function, whose gradient is written out: torch's own attention for
packed examples (varlen_attn, flex_attention) has no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.devices import on_device
from trainer.masks import Mask, masked

# What one more group costs beside its scores, in scores: some twenty operations more are started in each layer. A GPU
# computes far more scores in the time that this takes. The CPU's is the fastest of some in steps of roberta-base.
GROUP_COST, GROUP_COST_ON_GPU = 2**18, 2**24


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
    """added to the scores: 0, or minus infinity where a key is padding; [G * heads, 1, N]"""


@dataclass(frozen=True)
class Rows:
    """The way from rows [T, C, heads, D] of tokens to groups [C, G, heads, N, D] one after another, and back.

    C is 3 for queries, keys and values; 2 for keys and values; 1 for what attention gives.
    """

    take: torch.Tensor
    """row at each place of the groups, int64; at a place of padding any for C > 1, and for C = 1 row T, to be 0"""
    back: torch.Tensor
    """place of each row, int64 [T * C * heads]"""


@dataclass(frozen=True)
class Layout:
    """Where the T tokens of B examples lie."""

    groups: tuple[Group, ...]
    starts: torch.Tensor
    """first token of each example, int64 [B]"""
    positions: torch.Tensor
    """place of each token within its example, int64 [T]"""
    rows: dict[int, Rows]
    """by C"""

    def tensors(self) -> list[torch.Tensor]:
        """All that is on the device."""
        rows = [tensor for each in self.rows.values() for tensor in (each.take, each.back)]
        return [self.starts, self.positions, *rows, *(group.bias for group in self.groups)]


def lay_out(
    lengths: np.ndarray, num_heads: int, device: torch.device, dtype: torch.dtype, longest: int | None = None
) -> Layout:
    """The layout of examples of these lengths [B], on the device.

    Args:
        lengths: tokens of each example.
        num_heads: of attention.
        device: where the tokens are.
        dtype: that of the scores.
        longest: makes all examples one group, padded to so many tokens.
    """
    starts, num_tokens = np.cumsum(lengths) - lengths, int(lengths.sum())
    positions = np.arange(num_tokens) - np.repeat(starts, lengths)
    groups, tokens, homes = [], [], []
    first, num_places = 0, 0
    cost = GROUP_COST if device.type == "cpu" else GROUP_COST_ON_GPU
    for size in [len(lengths)] if longest is not None else group_sizes(lengths, cost / num_heads):
        own = lengths[first : first + size]
        width = longest or int(own.max())
        real = np.arange(width) < own[:, None]
        tokens.append(np.where(real, starts[first : first + size, None] + np.arange(width), num_tokens))
        homes.append(np.stack(np.broadcast_arrays(num_places, size, width, np.arange(size)), axis=-1))
        bias = on_device(np.where(real, np.float32(0), np.float32(-np.inf)), device).to(dtype)
        groups.append(Group(first, size, width, bias.repeat_interleave(num_heads, dim=0).unsqueeze(1)))
        first, num_places = first + size, num_places + size * width
    of_tokens = np.column_stack([np.repeat(np.concatenate(homes), lengths, axis=0), positions])
    facts = on_device(of_tokens, device), on_device(np.concatenate([each.ravel() for each in tokens]), device)
    return Layout(
        groups=tuple(groups),
        starts=on_device(starts, device),
        positions=on_device(positions, device),
        rows={c: _rows(groups, *facts, c, num_heads) for c in (1, 2, 3)},
    )


def group_sizes(lengths: np.ndarray, cost: float) -> list[int]:
    """How many examples attend together, group by group, so that padding and groups cost the least in all.

    Example: lengths [9, 8, 3, 3] -> [2, 2] for cost 40, [4] for cost 200   (162 + 18 + 2 * 40, or 324 + 200 for one)

    Args:
        lengths: tokens of each example, [B]; best in descending order.
        cost: of a group, in scores of one head.
    """
    if len(lengths) * int(lengths.max()) ** 2 <= cost:  # a second group would not pay, whatever it saved
        return [len(lengths)]
    ends = np.append(np.flatnonzero(np.diff(lengths)) + 1, len(lengths))  # examples of one length stay together
    starts, runs = np.append(0, ends[:-1]), lengths[ends - 1]
    least, before = np.zeros(len(ends) + 1), []
    for i, end in enumerate(ends.tolist(), 1):
        widest = np.maximum.accumulate(runs[:i][::-1])[::-1]
        costs = least[:i] + cost + (end - starts[:i]) * widest**2
        before.append(int(costs.argmin()))
        least[i] = costs[before[-1]]
    sizes, i = [], len(ends)
    while i > 0:
        sizes.append(int(ends[i - 1] - starts[before[i - 1]]))
        i = before[i - 1]
    return sizes[::-1]


def _rows(groups: list[Group], of_tokens: torch.Tensor, tokens: torch.Tensor, components: int, num_heads: int) -> Rows:
    """Made on the device: there are `components` times heads as many as tokens.

    Args:
        groups: of the layout.
        of_tokens: of each token, the places before its group, G, N, the number of its example in the group, and its
            position in the example; int64 [T, 5].
        tokens: the token at each place, T where it is padding; int64 [places].
        components: C.
        num_heads: of attention.
    """
    component = torch.arange(components, device=tokens.device)[:, None]
    head = torch.arange(num_heads, device=tokens.device)
    before, size, longest, example, position = of_tokens[:, :, None, None].unbind(1)
    block = (before * components + component * size * longest) * num_heads
    back = block + (example * num_heads + head) * longest + position
    num_rows = back.numel()
    take = [
        (part.view(group.size, 1, group.longest) * components + component[..., None, None]) * num_heads + head[:, None]
        for group, part in zip(groups, tokens.split([g.size * g.longest for g in groups]), strict=True)
    ]
    joined = torch.cat([part.flatten() for part in take])
    return Rows(joined if components == 1 else joined.where(joined < num_rows, 0), back.flatten())


@dataclass(frozen=True)
class Attention:
    """How the tokens of a layout attend to one another."""

    layout: Layout
    num_heads: int
    """H = heads D"""
    scaling: float
    """factor on the scores"""
    draw: Callable[[torch.Tensor, int], Mask | None]
    """gives dropout's mask, if any, of shares [G, heads, queries, N] and the number of their first example"""

    def __call__(self, projected: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        """What each token attends to, [T, H]; with a `query` of the first tokens [B, 1, H], what each of these does.

        Args:
            projected: query, key and value of every token, [T, 3 H]; with a `query`, key and value.
            query: see above.
        """
        attended: torch.Tensor = _Attention.apply(projected, query, self)
        return attended


class _Attention(torch.autograd.Function):
    """See `Attention`."""

    @staticmethod
    def forward(ctx: Any, projected: torch.Tensor, query: torch.Tensor | None, how: Attention) -> torch.Tensor:
        layout, num_heads = how.layout, how.num_heads
        components = 3 if query is None else 2
        size = projected.shape[-1] // components // num_heads
        gathered = projected.reshape(-1, size).index_select(0, layout.rows[components].take)
        if query is not None:
            query = query.reshape(-1, size)
        outputs = torch.empty_like(gathered[: len(gathered) // components] if query is None else query)
        kept, masks = [], []
        for group, q, k, v, output in _by_group(layout, num_heads, gathered, query, outputs):
            shares = _softmax(torch.baddbmm(group.bias, q, k.transpose(1, 2), alpha=how.scaling))
            mask = how.draw(shares.unflatten(0, (group.size, num_heads)), group.first)
            if mask is not None:
                mask = Mask(mask.keep.flatten(0, 1), mask.scale)
            _product_into(output, masked(shares, mask), v, _scale(mask))
            kept.append(shares)
            masks.append(mask)
        ctx.save_for_backward(gathered, query, *kept)
        ctx.how, ctx.masks = how, masks
        if query is None:
            outputs = outputs.index_select(0, layout.rows[1].back)
            return outputs.view(len(projected), -1)
        return outputs.view(len(layout.starts), 1, -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gathered, query, *kept = ctx.saved_tensors
        layout, num_heads, size = ctx.how.layout, ctx.how.num_heads, gathered.shape[-1]
        if query is None:
            with_zeros = torch.nn.functional.pad(gradient, (0, 0, 0, 1))  # for queries of padding
            of_outputs = with_zeros.view(-1, size).index_select(0, layout.rows[1].take)
        else:
            of_outputs = gradient.reshape(-1, size)
        of_gathered = torch.empty_like(gathered)
        of_query = None if query is None else torch.empty_like(query)
        inputs = _by_group(layout, num_heads, gathered, query, of_outputs)
        results = _by_group(layout, num_heads, of_gathered, of_query, of_outputs)
        each = zip(inputs, results, kept, ctx.masks, strict=True)
        for (_, q, k, v, of_output), (_, of_q, of_k, of_v, _), shares, mask in each:
            _product_into(of_v, masked(shares, mask).transpose(1, 2), of_output, _scale(mask))
            of_shares = torch.empty_like(shares)
            _product_into(of_shares, of_output, v.transpose(1, 2), _scale(mask) * ctx.how.scaling)
            of_scores = torch.ops.aten._softmax_backward_data(masked(of_shares, mask), shares, -1, shares.dtype)
            _product_into(of_q, of_scores, k)
            _product_into(of_k, of_scores.transpose(1, 2), q)
        of_projected = of_gathered.index_select(0, layout.rows[3 if query is None else 2].back)
        if of_query is not None:
            of_query = of_query.view_as(gradient)
        return of_projected.view(layout.positions.shape[0], -1), of_query, None


def _by_group(
    layout: Layout, num_heads: int, gathered: torch.Tensor, query: torch.Tensor | None, outputs: torch.Tensor
) -> Iterator[tuple[Group, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each group with its part of the inputs and of the outputs: q, k, v and output, [G * heads, N or 1, D] each."""
    components, before = (3 if query is None else 2), 0
    for group in layout.groups:
        number = group.size * num_heads
        span = slice(before, before + number * group.longest)
        block = gathered[components * span.start : components * span.stop]
        *own, k, v = block.view(components, number, group.longest, -1).unbind()
        if query is None:
            yield group, own[0], k, v, outputs[span].view_as(k)
        else:
            asking = slice(group.first * num_heads, group.first * num_heads + number)
            yield group, query[asking].unsqueeze(1), k, v, outputs[asking].unsqueeze(1)
        before = span.stop


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """Over the last axis, in the type of the scores but computed in at least fp32."""
    if scores.device.type != "cpu":  # this one does so by itself; a CPU's takes longer for it
        shares: torch.Tensor = torch.ops.aten._softmax(scores, -1, False)
        return shares
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _product_into(output: torch.Tensor, one: torch.Tensor, other: torch.Tensor, scale: float = 1.0) -> None:
    output.baddbmm_(one, other, beta=0, alpha=scale)


def _scale(mask: Mask | None) -> float:
    return 1.0 if mask is None else mask.scale
