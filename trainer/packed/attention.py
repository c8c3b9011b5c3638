"""Attention within each example, where the examples of a micro-batch lie end to end on one token axis.

Always holds: no token attends to a token of another example, or to padding. Examples of similar length form a *group*.
A group is padded to its longest example, for attention alone. The gradient is written out here, since torch's own
attention for packed examples (varlen_attn, flex_attention) has no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from trainer.compat import on_device, softmax_backward
from trainer.dropout.masks import Mask, dropped, masked

# The cost of one more group, in scores: each layer starts some twenty operations more. The value was the fastest of a
# few on a CPU, in steps of roberta-base.
GROUP_COST = 2**18


@dataclass(frozen=True)
class Group:
    """G examples of a micro-batch that attend together, padded to the longest of them."""

    first: int
    """number of its first example in the micro-batch"""
    size: int
    """G"""
    longest: int
    """tokens of the longest example, N"""
    bias: torch.Tensor
    """added to the scores: minus infinity where a key is padding, else 0 or `add_bias`'s; [G * key heads, 1 or N, N]

    By `look_back`: minus infinity where a query must not see a key; [1, heads per key head * N, N].
    """


@dataclass(frozen=True)
class Rows:
    """Where rows of the token axis lie in the padded groups, and the way back."""

    take: torch.Tensor
    """row at each place of the groups, int64; at padding any row, or the one behind the last"""
    back: torch.Tensor
    """place of each row, int64"""


@dataclass(frozen=True)
class Layout:
    """Where the T tokens of B examples lie."""

    groups: tuple[Group, ...]
    lengths: np.ndarray
    """tokens of each example, int64 [B]"""
    starts: torch.Tensor
    """first token of each example, int64 [B]"""
    positions: torch.Tensor
    """position of each token in its example, int64 [T]"""
    num_heads: int
    """of queries"""
    num_key_heads: int
    """of keys and of values; each is read by `num_heads` / `num_key_heads` heads of queries in a row"""
    projected: Rows
    """queries, keys and values: [T, all heads, D] to [G, heads, N, D] of each group, one after the other; padding
    takes any row"""
    attended: Rows
    """[T, heads, D] to [G, heads, N, D] of each group; padding takes the row behind the last, which is 0"""
    whole: Rows
    """[T, W] to [G, N, W] of each group; padding takes any row"""


def lay_out(
    lengths: np.ndarray, num_heads: int, device: torch.device, dtype: torch.dtype, num_key_heads: int | None = None
) -> Layout:
    """The layout of examples of these lengths [B]; `dtype` is that of the scores.

    `num_key_heads`: see `Layout`; None = as many as `num_heads`.
    """
    num_key_heads = num_key_heads or num_heads
    starts, num_tokens = np.cumsum(lengths) - lengths, int(lengths.sum())
    groups, tokens, first = [], [], 0
    for size in group_sizes(lengths, GROUP_COST / num_heads):
        own = lengths[first : first + size]
        real = np.arange(own.max()) < own[:, None]
        tokens.append(np.where(real, starts[first : first + size, None] + np.arange(own.max()), num_tokens))
        bias = on_device(np.where(real, np.float32(0), np.float32(-np.inf)), device).to(dtype)
        groups.append(Group(first, size, int(own.max()), bias.repeat_interleave(num_key_heads, dim=0).unsqueeze(1)))
        first += size
    places = [on_device(each, device) for each in tokens]
    heads = [num_heads, num_key_heads, num_key_heads]
    projected, attended, whole = (_rows(places, num_tokens, each) for each in (heads, [num_heads], [1]))
    return Layout(
        groups=tuple(groups),
        lengths=lengths,
        starts=on_device(starts, device),
        positions=on_device(np.arange(num_tokens) - np.repeat(starts, lengths), device),
        num_heads=num_heads,
        num_key_heads=num_key_heads,
        projected=Rows(projected.take % len(projected.back), projected.back),
        attended=attended,
        whole=Rows(whole.take % num_tokens, whole.back),
    )


def add_bias(layout: Layout, bias: torch.Tensor) -> Layout:
    """The layout with a bias on the scores of each head, query and key: [heads or 1, N, N] of the longest example.

    It has no gradient. It must leave each query a finite score, also the queries of padding.
    """
    groups = []
    for group in layout.groups:
        own = bias[:, : group.longest, : group.longest].to(group.bias.dtype)
        per_head = group.bias.unflatten(0, (group.size, layout.num_heads)) + own
        groups.append(replace(group, bias=per_head.flatten(0, 1)))
    return replace(layout, groups=tuple(groups))


def look_around(layout: Layout, reach: int) -> Layout:
    """The layout with attention to at most `reach` tokens before a token and as many after it."""
    longest = max(group.longest for group in layout.groups)
    if longest <= reach + 1:
        return layout
    position = torch.arange(longest, device=layout.starts.device)
    far = (position - position[:, None]).abs() > reach
    bias = torch.zeros_like(far, dtype=layout.groups[0].bias.dtype)
    # a finite number: to a token of padding all near ones may be padding
    return add_bias(layout, bias.masked_fill_(far, torch.finfo(bias.dtype).min / 2).unsqueeze(0))


def look_back(layout: Layout, window: int | None) -> Layout:
    """The layout with attention to a token itself and to those before it, in all `window` tokens; None = no limit.

    Replaces the layout's bias: no token sees the padding behind it.
    """
    groups, num_queries = [], layout.num_heads // layout.num_key_heads
    for group in layout.groups:
        open_keys = torch.ones(group.longest, group.longest, dtype=torch.bool, device=group.bias.device).tril()
        open_keys = open_keys if window is None else open_keys.triu(1 - window)
        bias = torch.zeros_like(open_keys, dtype=group.bias.dtype).masked_fill(~open_keys, -torch.inf)
        groups.append(replace(group, bias=bias.repeat(num_queries, 1).unsqueeze(0)))
    return replace(layout, groups=tuple(groups))


def _rows(tokens: list[torch.Tensor], num_tokens: int, heads: list[int]) -> Rows:
    """[T, all heads] to [G, heads, N] of each group and of each of `heads`; padding takes the row behind the last.

    `tokens` are the tokens at the places of each group, [G, N], and T at padding.
    """
    per_token = sum(heads)
    num_rows, of_token = num_tokens * per_token, torch.arange(per_token, device=tokens[0].device)
    rows = [(group[..., None] * per_token + of_token).clamp(max=num_rows) for group in tokens]
    take = torch.cat([part.transpose(1, 2).flatten() for group in rows for part in group.split(heads, dim=-1)])
    back = torch.empty(num_rows + 1, dtype=torch.int64, device=take.device)
    back[take] = torch.arange(len(take), device=take.device)
    return Rows(take, back[:num_rows])


def group_sizes(lengths: np.ndarray, cost: float) -> list[int]:
    """How many examples each group takes, so that padding and groups together cost the least.

    Example: lengths [9, 8, 3, 3] -> [2, 2] for cost 40, [4] for cost 200   (162 + 18 + 2 * 40, or 324 + 200 for one)

    `lengths` [B] are best in descending order. `cost` is of a group, in scores of one head.
    """
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


@dataclass(frozen=True)
class Rotary:
    """Rotary positions, from 0 on in each example: the two halves of a head turn by angles that grow with the position.

    A group is padded behind its examples. So a token's place in its group is its position.
    """

    cos: torch.Tensor
    """of the angle by which a unit turns with the one half a head away, [N of the longest example, D]"""
    sin: torch.Tensor
    rounds_to: torch.dtype | None = None
    """the type to which the family rounds queries and keys before it turns them, also in fp64; None: it does not"""

    def turn(self, x: torch.Tensor) -> None:
        """Turns queries or keys in place, [..., N, D]."""
        by_cos, by_sin = self._products(x.to(self.rounds_to or x.dtype))
        half = x.shape[-1] // 2
        by_cos[..., :half] -= by_sin[..., half:]
        by_cos[..., half:] += by_sin[..., :half]
        x.copy_(by_cos)

    def turn_back(self, gradient: torch.Tensor) -> None:
        """Replaces the gradient of the turned by the gradient of what was turned, [..., N, D]."""
        products = self._products(gradient)
        by_cos, by_sin = (each.to(self.rounds_to or each.dtype).to(each.dtype) for each in products)
        half = gradient.shape[-1] // 2
        by_cos[..., :half] += by_sin[..., half:]
        by_cos[..., half:] -= by_sin[..., :half]
        gradient.copy_(by_cos)

    def _products(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x times cos and x times sin, in at least the type of these; tensors of two types are slow to multiply."""
        x, num_places = x.to(torch.promote_types(x.dtype, self.cos.dtype)), x.shape[-2]
        return x * self.cos[:num_places], x * self.sin[:num_places]


@dataclass(frozen=True)
class Attention:
    """Attention of one layer in one micro-batch; H is heads times D."""

    layout: Layout
    scaling: float
    """factor on the scores"""
    draw: Callable[[torch.Tensor, int], Mask | None]
    """dropout's mask of shares [G, heads, queries, N], or None; also takes the number of their first example"""
    rotary: Rotary | None = None
    """what turns queries and keys; None: nothing does"""

    def of_all(self, projected: torch.Tensor) -> torch.Tensor:
        """The output of every token, [T, H], from its queries, keys and values side by side, [T, all heads * D]."""
        attended: torch.Tensor = _Attention.apply(projected, self)
        return attended

    def of_first(self, query: torch.Tensor, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The output of the first token of each example, [B, 1, H], without any token's key or value.

        A score is query . (key x) = (query key) . x. The sum of shares times (value x) is value times the sum of shares
        times x. So the two weights, [H, W] each, multiply once per example and not once per token.

        `query` is of the first tokens, [B, 1, H]; `x` is [T, W].
        """
        num_heads = self.layout.num_heads
        per_head = (num_heads, -1, x.shape[-1])
        asked = query.view(len(query), num_heads, -1).transpose(0, 1).bmm(key.view(per_head)).transpose(0, 1)
        sums, begin = [], 0
        gathered = _Gather.apply(x, self.layout.whole)
        for group in self.layout.groups:
            own = gathered[begin : begin + group.size * group.longest].view(group.size, group.longest, -1)
            asking = asked[group.first : group.first + group.size]
            bias = group.bias[:, 0].view(group.size, num_heads, -1)
            shares = _softmax(torch.baddbmm(bias, asking, own.transpose(1, 2), alpha=self.scaling)).unsqueeze(2)
            sums.append(dropped(shares, self.draw(shares, group.first)).squeeze(2).bmm(own))
            begin += group.size * group.longest
        attended = torch.cat(sums).transpose(0, 1).bmm(value.view(per_head).transpose(1, 2))
        return attended.transpose(0, 1).reshape(query.shape)


class _Attention(torch.autograd.Function):
    """See `Attention.of_all`."""

    @staticmethod
    def forward(ctx: Any, projected: torch.Tensor, how: Attention) -> torch.Tensor:
        layout = how.layout
        num_rows = layout.num_heads + 2 * layout.num_key_heads
        gathered = projected.reshape(-1, projected.shape[-1] // num_rows).index_select(0, layout.projected.take)
        outputs = gathered.new_empty(len(layout.attended.take), gathered.shape[-1])
        kept, keeps, scale = [], [], 1.0
        for group, q, k, v, output in _by_group(layout, gathered, outputs):
            if how.rotary is not None:
                for heads in (q, k):
                    how.rotary.turn(heads.view(-1, group.longest, q.shape[-1]))
            shares = _softmax(torch.baddbmm(group.bias, q, k.transpose(1, 2), alpha=how.scaling))
            mask = how.draw(shares.view(group.size, layout.num_heads, group.longest, -1), group.first)
            if mask is not None:
                mask, scale = Mask(mask.keep.view(shares.shape), mask.scale), mask.scale
                keeps.append(mask.keep)
            _multiply_into(output, masked(shares, mask), v, scale)
            kept.append(shares)
        ctx.save_for_backward(gathered, *kept, *keeps)
        ctx.how, ctx.scale = how, scale
        return outputs.index_select(0, layout.attended.back).view(len(projected), -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gathered, *saved = ctx.saved_tensors
        layout, rotary, size = ctx.how.layout, ctx.how.rotary, gathered.shape[-1]
        with_zeros = torch.nn.functional.pad(gradient, (0, 0, 0, 1))  # for queries of padding
        grad_outputs = with_zeros.view(-1, size).index_select(0, layout.attended.take)
        grad_gathered = torch.empty_like(gathered)
        inputs = _by_group(layout, gathered, grad_outputs)
        results = _by_group(layout, grad_gathered, grad_outputs)
        kept, keeps, scale = saved[: len(layout.groups)], saved[len(layout.groups) :], ctx.scale
        masks: list[Any] = [Mask(keep, scale) for keep in keeps] or [None] * len(kept)
        each = zip(inputs, results, kept, masks, strict=True)
        for (group, q, k, v, grad_output), (_, grad_q, grad_k, grad_v, _), shares, mask in each:
            _multiply_into(grad_v, masked(shares, mask).transpose(1, 2), grad_output, scale)
            grad_shares = torch.empty_like(shares)
            _multiply_into(grad_shares, grad_output, v.transpose(1, 2), scale * ctx.how.scaling)
            grad_scores = softmax_backward(masked(grad_shares, mask), shares)
            _multiply_into(grad_q, grad_scores, k)
            _multiply_into(grad_k, grad_scores.transpose(1, 2), q)
            if rotary is not None:
                for heads in (grad_q, grad_k):
                    rotary.turn_back(heads.view(-1, group.longest, size))
        return grad_gathered.index_select(0, layout.projected.back).view(len(gradient), -1), None


def _by_group(
    layout: Layout, gathered: torch.Tensor, outputs: torch.Tensor
) -> Iterator[tuple[Group, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each group with its part of the inputs and of the outputs: q, k, v and output.

    k and v are [G * key heads, N, D], q and output [G * key heads, heads per key head * N, D].
    """
    begin, output_begin, heads = 0, 0, (layout.num_heads, layout.num_key_heads, layout.num_key_heads)
    for group in layout.groups:
        sizes = [group.size * number * group.longest for number in heads]
        parts = gathered[begin : begin + sum(sizes)].split(sizes)
        parts = [*parts, outputs[output_begin : output_begin + sizes[0]]]
        q, k, v, output = (part.view(group.size * layout.num_key_heads, -1, part.shape[-1]) for part in parts)
        yield group, q, k, v, output
        begin, output_begin = begin + sum(sizes), output_begin + sizes[0]


class _Gather(torch.autograd.Function):
    """The rows of x at the places of the groups. Those at padding have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.take)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.index_select(0, ctx.rows.back), None


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """Over the last axis, in the type of the scores, computed in at least fp32."""
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _multiply_into(output: torch.Tensor, one: torch.Tensor, other: torch.Tensor, scale: float = 1.0) -> None:
    output.baddbmm_(one, other, beta=0, alpha=scale)
