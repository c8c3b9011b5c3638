"""Dropout whose masks are a pure function of (seed, step, example id, site).

Always holds: which units of an example are dropped does not depend on its rank, its padding or its place in a batch; so
one process or eight, resumed or not, drop the same units. A *site* is one dropout call of the forward, counted in the
order of execution; `install` finds them by one forward over two dummy examples.

Masks come from numpy's counter-based Philox4x64-10 (Salmon et al., 2011): key (seed, step), counter (0, example id,
1, 0), one bulk draw per example and step; the 1 keeps it apart from the order of epoch `step`, which has the same key.
Every site takes a run of 64-bit words: the first decides the threshold, the others give one byte a unit. A byte below
the threshold drops its unit. 256 p is rarely whole (p = 0.1: 25.6), so the threshold is 25 or 26, drawn so that a
unit's probability to be dropped is p to within 2**-53.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
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

ATTENTION = "isotrain"
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

    def words(self, length: int) -> int:
        """64-bit words this site takes from an example's stream."""
        return 1 + -(-math.prod(self.shape(length)) // 8)


class DropoutKeys:
    """The masks of the micro-batch at hand. One for a model; the only mutable state of this module."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.sites: list[Site | None] = []
        """in order of execution; None where a shape shows no example or token axis"""
        self.unreached: list[str] = []
        """random operations of the forward that are not ours"""
        self._recording = False
        self._call = 0
        self._streams: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._pool = ThreadPoolExecutor(torch.get_num_threads())  # numpy draws without the interpreter's lock

    @contextlib.contextmanager
    def micro_batch(self, step: int, ids: np.ndarray, lengths: np.ndarray) -> Iterator[None]:
        """Draws the masks of these examples [B]; inside, the model's forward uses them."""
        global _current
        self._lengths = lengths.tolist()
        num_words = [self._num_words(length) for length in self._lengths]
        self._streams = list(self._pool.map(example_stream, repeat(self.seed), repeat(step), ids.tolist(), num_words))
        self._call = 0
        self._offsets = [0] * len(self._lengths)
        _current = self
        try:
            yield
        finally:
            _current = None
            self._streams = []

    def drop(self, x: torch.Tensor, p: float) -> torch.Tensor:
        """Drops units of `x` with probability p and scales the others by 1 / (1 - p)."""
        if self._recording:
            self.sites.append(_site_of(x.shape))
            return x if self.sites[-1] is not None else nn.functional.dropout(x, p)
        site = self.sites[self._call]
        self._call += 1
        if site is None:
            return nn.functional.dropout(x, p)
        keep = torch.from_numpy(self._keep(site, tuple(x.shape), p)).to(x.device, non_blocking=True)
        return x * keep * (1 / (1 - p))

    def _num_words(self, length: int) -> int:
        return sum(site.words(length) for site in self.sites if site is not None)

    def _keep(self, site: Site, shape: tuple[int, ...], p: float) -> np.ndarray:
        """Which units of the padded tensor stay, 1 or 0 [shape]; padding is dropped.

        Bytes: torch makes floats of them several times faster than of booleans.
        """
        keep = np.zeros(shape, dtype=bool)
        for row, (stream, length) in enumerate(zip(self._streams, self._lengths, strict=True)):
            start = self._offsets[row]
            self._offsets[row] += site.words(length)
            own = site.shape(length)
            units = stream[start + 1 : self._offsets[row]].view(np.uint8)[: math.prod(own)]
            threshold = int(p * 256 + (int(stream[start]) >> 11) * 2.0**-53)
            region = keep[row][tuple(slice(size) for size in own)]
            np.greater_equal(units.reshape(own), threshold, out=region)
        return keep.view(np.uint8)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, the model's forward tells its sites and drops nothing."""
        global _current
        self.sites, self.unreached = [], []
        self._recording, _current = True, self
        try:
            with _RandomOperations(self.unreached):
                yield
        finally:
            self._recording, _current = False, None


_current: DropoutKeys | None = None


class KeyedDropout(nn.Module):
    """Stands where an `nn.Dropout` stood. Outside of a keyed micro-batch it is an ordinary dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and type as `x`."""
        if not self.training or self.p == 0:
            return x
        return _current.drop(x, self.p) if _current is not None else nn.functional.dropout(x, self.p)

    def extra_repr(self) -> str:
        """Shown in `print(model)`."""
        return f"p={self.p}"


def example_stream(seed: int, step: int, example: int, num_words: int) -> np.ndarray:
    """The random words of one example in one step, uint64 [num_words]."""
    return np.random.Philox(key=[seed, step], counter=[0, example, 1, 0]).random_raw(num_words)


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
    attended = _current.drop(shares.to(value.dtype), dropout)
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
