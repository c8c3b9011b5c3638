"""Dropout whose masks are a pure function of (seed, step, example id, site).

Always holds: which units of an example are dropped does not depend on its rank, its padding or its place in a batch; so
one process or eight, resumed or not, padded or packed, drop the same units. A *site* is one dropout call of the
forward, counted in the order of execution; `install` finds them by one forward over two dummy examples.

Masks come from numpy's counter-based Philox4x64-10 (Salmon et al., 2011): key (seed, step), counter (0, example id,
1, 0), one bulk draw per example and step; the 1 keeps it apart from the order of epoch `step`, which has the same key.
Every site takes a run of 64-bit words: the first decides the threshold, the others give one byte a unit. A byte below
the threshold drops its unit. 256 p is rarely whole (p = 0.1: 25.6), so the threshold is 25 or 26, drawn so that a
unit's probability to be dropped is p to within 2**-53.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainer.philox import random_blocks

ATTENTION = "isotrain"
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a unit
DRAWN_AT_ONCE = 16384  # words; they stay in a core's cache
PROBE_BATCH, PROBE_LENGTH = 2, 11
# What a site drops, by which of the axes behind the example's are as long as the example.
KINDS = {(False,): "pooled", (True, False): "tokens", (False, True, True): "attention"}


@dataclass(frozen=True)
class Site:
    """One dropout call: what it drops, as a function of an example's length n in tokens.

    `tokens`: [n, width]; `attention`: [width heads, n, n]; `pooled`: [width].
    """

    kind: str
    width: int

    def shape(self, length: int) -> tuple[int, ...]:
        """Units of one example of `length` tokens."""
        if self.kind == "tokens":
            return (length, self.width)
        if self.kind == "attention":
            return (self.width, length, length)
        return (self.width,)

    def words(self, lengths: np.ndarray) -> np.ndarray:
        """64-bit words this site takes from the stream of each example, int64 [B]."""
        num_units = self.width * lengths ** (len(self.shape(1)) - 1)
        return 1 + -(-num_units // 8)


class DropoutKeys:
    """The masks of the micro-batch at hand. One for a model; the only mutable state of this module."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.sites: dict[tuple[Hashable, int], Site | None] = {}
        """by who calls and the number of its call, in order of execution; None: its shape shows no example or token"""
        self.unreached: list[str] = []
        """random operations of the forward that are not ours"""
        self._recording = False
        self._calls: Counter[Hashable] = Counter()
        self._step = 0
        self._ids = self._lengths = np.zeros(0, dtype=np.int64)
        self._words = np.zeros(0, dtype=np.uint64)  # kept: fresh memory costs as much as drawing
        self._streams: list[np.ndarray] = []
        self._starts: dict[tuple[Hashable, int], np.ndarray] = {}
        self._pool = ThreadPoolExecutor(torch.get_num_threads())  # numpy draws without the interpreter's lock

    @contextlib.contextmanager
    def micro_batch(self, step: int, ids: np.ndarray, lengths: np.ndarray) -> Iterator[None]:
        """Inside, the model's forward over these examples [B] drops their units."""
        global _current
        self._step, self._ids, self._lengths = step, ids, lengths
        num_words = np.zeros(len(lengths), dtype=np.int64)
        for key, site in self.sites.items():
            if site is not None:
                self._starts[key] = num_words.copy()
                num_words += site.words(lengths)
        self._num_words = num_words
        self._calls.clear()
        _current = self
        try:
            yield
        finally:
            _current = None
            self._streams = []

    def drop(self, x: torch.Tensor, p: float, caller: Hashable) -> torch.Tensor:
        """Drops units of `x` with probability p and scales the others by 1 / (1 - p); `x` and `caller` as in `mask`."""
        mask = self.mask(x, p, caller)
        return x if mask is None else _Drop.apply(x, mask)

    def mask(self, x: torch.Tensor, p: float, caller: Hashable, first: int = 0) -> Mask | None:
        """Which units of `x` to drop; None while sites are recorded.

        Args:
            x: a unit of the site, for examples on the first axis; or for tokens end to end, [T, width]. Of an example
                it may have more than its units (padding, which is dropped) or only the first ones along each axis.
                Only its shape and device matter.
            p: probability.
            caller: whose call this is: the module.
            first: number of the first example of `x` in the micro-batch; after 0, calls go on with the same site.
        """
        self._calls[caller] += first == 0
        key = (caller, self._calls[caller])
        if self._recording:
            self.sites[key] = _site_of(x.shape)
            return None if self.sites[key] is not None else unkeyed_mask(x, p)
        site = self.sites[key]
        if site is None:
            return unkeyed_mask(x, p)
        make = self._keep if x.device.type == "cpu" else self._keep_on_device
        return Mask(make(site, self._starts[key], x, p, first), 1 / (1 - p))

    def _keep(self, site: Site, starts: np.ndarray, x: torch.Tensor, p: float, first: int) -> torch.Tensor:
        """The `Mask.keep` of x."""
        if not self._streams:
            ends = self._num_words.cumsum()
            if len(self._words) < ends[-1]:
                self._words = np.empty(ends[-1], dtype=np.uint64)
            self._streams = np.split(self._words[: ends[-1]], ends[:-1])
            list(self._pool.map(draw_stream, repeat(self.seed), repeat(self._step), self._ids.tolist(), self._streams))
        shape = tuple(x.shape)
        keep = np.zeros(shape, dtype=bool)
        if site.kind == "tokens" and len(shape) == 2:
            regions = np.split(keep, np.cumsum(self._lengths)[:-1])
        else:
            regions = list(keep)
        for row, region in enumerate(regions, first):
            stream, start = self._streams[row], int(starts[row])
            own = site.shape(int(self._lengths[row]))
            units = stream[start + 1 :].view(np.uint8)[: math.prod(own)].reshape(own)
            units = units[tuple(map(slice, region.shape))]
            threshold = int(p * 256 + (int(stream[start]) >> 11) * 2.0**-53)
            np.greater_equal(units, threshold, out=region[tuple(map(slice, units.shape))])
        bits = keep.view(np.int8)
        return torch.from_numpy(np.negative(bits, out=bits))

    def _keep_on_device(self, site: Site, starts: np.ndarray, x: torch.Tensor, p: float, first: int) -> torch.Tensor:
        """`_keep` by the device that has x, which draws the words of this site itself, in whole blocks of four."""
        flat = site.kind == "tokens" and x.dim() == 2
        rows = slice(first, first + (len(self._lengths) if flat else len(x)))
        starts, lengths = starts[rows], self._lengths[rows]
        first_block = starts // 4
        num_blocks = (starts + site.words(lengths) + 3) // 4 - first_block
        before = num_blocks.cumsum() - num_blocks
        head = 4 * (before - first_block) + starts  # where a row's first word, of its threshold, lies among all
        facts = np.stack([num_blocks, first_block - before, self._ids[rows], head, lengths, lengths.cumsum() - lengths])
        blocks, shift, ids, head, n, token = torch.from_numpy(facts).to(x.device, non_blocking=True)
        row = torch.repeat_interleave(blocks, output_size=int(num_blocks.sum()))
        counter = torch.arange(len(row), device=x.device) + shift[row]
        words = random_blocks((self.seed, self._step), counter, ids[row], 1).flatten()
        uniform = ((words[head] >> 11) & (2**53 - 1)).double() * 2.0**-53
        threshold, base = (p * 256 + uniform).to(torch.int16), 8 * (head + 1)
        axes = [torch.arange(size, device=x.device) for size in x.shape]
        if flat:
            row = torch.repeat_interleave(n, output_size=len(x))
            unit = (base - token * site.width)[row, None] + axes[0][:, None] * site.width + axes[1]
            return -(words.view(torch.uint8)[unit] >= threshold[row, None]).view(torch.int8)
        behind = (-1, *[1] * (x.dim() - 1))
        n, base, threshold = n.view(behind), base.view(behind), threshold.view(behind)
        if site.kind == "pooled":
            unit, real = base + axes[1], torch.ones_like(n, dtype=torch.bool)
        elif site.kind == "tokens":
            unit, real = base + axes[1][:, None] * site.width + axes[2], axes[1][:, None] < n
        else:
            head_, query, key = axes[1][:, None, None], axes[2][:, None], axes[3]
            unit, real = base + (head_ * n + query) * n + key, (query < n) & (key < n)
        keep = (words.view(torch.uint8)[torch.where(real, unit, 0)] >= threshold) & real
        return -keep.view(torch.int8)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, the model's forward tells its sites and drops nothing."""
        global _current
        self.sites, self.unreached = {}, []
        self._calls.clear()
        self._recording, _current = True, self
        try:
            with _RandomOperations(self.unreached):
                yield
        finally:
            self._recording, _current = False, None


_current: DropoutKeys | None = None


@dataclass(frozen=True)
class Mask:
    """What one dropout call drops."""

    keep: torch.Tensor
    """int8, of the shape of what is masked: all bits set where a unit stays, none where it is dropped or padding"""
    scale: float
    """by which the units that stay are multiplied, 1 / (1 - p)"""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x with the dropped units 0 and the others as they are, not scaled.

        By its bits: several times faster than a product or a choice, on a CPU.
        """
        bits = BITS[x.element_size()]
        return (x.view(bits) & self.keep.to(bits)).view(x.dtype)


class _Drop(torch.autograd.Function):
    """x with units dropped, and the others scaled."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: Mask) -> torch.Tensor:
        ctx.mask = mask
        return mask.apply(x).mul_(mask.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.mask.apply(gradient).mul_(ctx.mask.scale), None


class _DropAdd(torch.autograd.Function):
    """`residual`, to which `x` with units dropped and the others scaled is added."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor, mask: Mask) -> torch.Tensor:
        ctx.mask, ctx.dtype = mask, x.dtype
        return torch.add(residual, mask.apply(x), alpha=mask.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return ctx.mask.apply(gradient.to(ctx.dtype)).mul_(ctx.mask.scale), gradient, None


class KeyedDropout(nn.Module):
    """Stands where an `nn.Dropout` stood. Outside of a keyed micro-batch its units are torch's choice."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and type as `x`."""
        mask = self.mask(x)
        return x if mask is None else _Drop.apply(x, mask)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """self(x) + residual, in fewer passes."""
        mask = self.mask(x)
        return x + residual if mask is None else _DropAdd.apply(x, residual, mask)

    def mask(self, x: torch.Tensor) -> Mask | None:
        """Which units of `x` to drop; None where none is."""
        if not self.training or self.p == 0:
            return None
        return _current.mask(x, self.p, self) if _current is not None else unkeyed_mask(x, self.p)

    def extra_repr(self) -> str:
        """Shown in `print(model)`."""
        return f"p={self.p}"


def unkeyed_mask(x: torch.Tensor, p: float) -> Mask:
    """The mask that torch's own dropout would draw now."""
    keep = nn.functional.dropout(torch.ones(x.shape, device=x.device), p) != 0
    return Mask(-keep.view(torch.int8), 1 / (1 - p))


def draw_stream(seed: int, step: int, example: int, words: np.ndarray) -> None:
    """Fills `words`, uint64 [W], with the random words of one example in one step."""
    stream = np.random.Philox(key=[seed, step], counter=[0, example, 1, 0])
    for start in range(0, len(words), DRAWN_AT_ONCE):
        part = words[start : start + DRAWN_AT_ONCE]
        part[:] = stream.random_raw(len(part))


def install(model: nn.Module, seed: int) -> DropoutKeys:
    """Puts keyed dropout in place of the model's own: modules, PEFT's, and inside attention.

    Args:
        model: transformers model for sequence classification, perhaps PEFT-wrapped; changed in place.
        seed: of the run.

    Returns:
        the keys; `unreached` names the random operations that stay the model's own.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                module.register_module(name, KeyedDropout(child.p))
    backbone = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    _use_keyed_attention(backbone)
    keys = DropoutKeys(seed)
    _probe(model, keys, getattr(backbone.config, "eos_token_id", None))
    return keys


def _use_keyed_attention(model: PreTrainedModel) -> None:
    AttentionInterface.register(ATTENTION, keyed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    # a family without transformers' attention interface keeps its own attention, whose dropout is a module; the probe
    # tells whether that was reached
    if model._can_set_attn_implementation():
        model.set_attn_implementation(ATTENTION)


def keyed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with keyed dropout on its probabilities, as transformers' attention interface wants it.

    Without dropout, and for causal models, it is transformers' own SDPA attention.

    Args:
        module: the attention layer that calls.
        query: [B, heads, L, head size]; key and value likewise.
        key: see query.
        value: see query.
        attention_mask: bool [B, 1, L, L], True where attended, or None.
        dropout: probability, 0 in evaluation.
        scaling: factor on the scores; None = 1 / sqrt(head size).
        kwargs: what SDPA attention takes besides.

    Returns:
        [B, L, heads, head size], and None for the probabilities.
    """
    if _current is None or dropout == 0 or getattr(module, "is_causal", False) or query.shape[1] != key.shape[1]:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:  # added, for filling in every head costs more; the exponential is 0 as well
        unattended = torch.zeros_like(attention_mask, dtype=scores.dtype)
        scores += unattended.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
    shares = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    attended = _current.drop(shares.to(value.dtype), dropout, module)
    return torch.matmul(attended, value).transpose(1, 2).contiguous(), None


def _site_of(shape: torch.Size) -> Site | None:
    along = tuple(size == PROBE_LENGTH for size in shape[1:])
    if shape[0] != PROBE_BATCH or along not in KINDS:
        return None
    return Site(KINDS[along], next(size for size in shape[1:] if size != PROBE_LENGTH))


def _probe(model: nn.Module, keys: DropoutKeys, end_token: Any) -> None:
    """Fills `keys.sites` by one forward in training mode over dummy examples; no weight and no random state changes."""
    training = model.training
    device = next(model.parameters()).device
    ids = torch.ones(PROBE_BATCH, PROBE_LENGTH, dtype=torch.long, device=device)
    if isinstance(end_token, int):  # encoder-decoders classify by the last end token
        ids[:, -1] = end_token
    mask = torch.ones_like(ids)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad(), keys.recording():
        model.train()
        model(input_ids=ids, attention_mask=mask)
    model.train(training)


class _RandomOperations(TorchDispatchMode):
    """Notes each random operation that runs inside."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(word in name for word in ("dropout", "bernoulli", "rand")) and name not in self.found:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
