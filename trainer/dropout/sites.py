"""Keyed dropout in a model: where the model drops, and which example and site each mask is for.

Always holds: one process or eight, resumed or not, padded or packed, drop the same units of an example. A *site* is one
dropout call of the forward, counted in the order of execution. `install` replaces the model's own dropout. It finds the
sites by one forward over two dummy examples. The masks themselves are drawn in masks.py.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainer.compat import TorchDispatchMode, can_replace_sdpa, replace_sdpa
from trainer.dropout.masks import Mask, Masks, Site, dropped, unkeyed_mask

ATTENTION = "isotrain"
# With these keywords of SDPA attention `keyed_attention` leaves the work to transformers, dropout included.
UNKEYED = {*inspect.signature(sdpa_attention_forward).parameters, "softcap"} - {
    "module", "query", "key", "value", "attention_mask", "dropout", "scaling", "position_bias", "kwargs",
}  # fmt: skip
PROBE_BATCH, PROBE_LENGTH = 2, 11  # the length at least
# The kind of a site, by which axes are as long as the example; the first axis, of the examples, is left out.
KINDS = {(False,): "pooled", (True, False): "tokens", (False, True, True): "attention"}


class DropoutKeys:
    """The masks of a model's micro-batches."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.sites: dict[tuple[Hashable, int], Site | None] = {}
        """by calling module and the number of its call, in order of execution; None: the shape has no known kind"""
        self.unreached: list[str] = []
        """random operations of the forward that stay the model's own"""
        self.skips_layers = False
        """whether a step may leave a layer without gradient"""
        self._calls: Counter[Hashable] = Counter()
        self._numbers: dict[tuple[Hashable, int], int] = {}
        self._masks: Masks

    @contextlib.contextmanager
    def micro_batch(self, step: int, ids: np.ndarray, lengths: np.ndarray) -> Iterator[None]:
        """Inside, the model's forward is over these examples, [B], and drops their units."""
        found = {key: site for key, site in self.sites.items() if site is not None}
        self._numbers = {key: number for number, key in enumerate(found)}
        self._masks = Masks(list(found.values()), self.seed, step, ids, lengths)
        self._calls.clear()
        with _draw_masks_by(self.mask):
            yield

    def mask(self, x: torch.Tensor, p: float, caller: Hashable, first: int = 0) -> Mask:
        """Which units of `x` to drop; only its shape and device matter.

        It has the examples on its first axis, or the tokens end to end, [T, width]. An example may have padding, or
        only its first units along an axis. `first` is the number of its first example in the micro-batch; with another
        number than 0 the call belongs to the site of the call before it.
        """
        self._calls[caller] += first == 0
        key = caller, self._calls[caller]
        site = self.sites[key]
        if site is None:
            return unkeyed_mask(x, p)
        assert p == site.p, "dropout has changed since the sites were recorded"
        return Mask(self._masks.keep(self._numbers[key], tuple(x.shape), first, x.device), 1 / (1 - p))

    def checkpoint(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Calls a part of the forward and keeps none of its activations: backward calls it again, with equal masks."""
        calls = self._calls.copy()

        def compute(*inputs: Any) -> Any:
            self._calls = calls.copy()
            return function(*inputs)

        return checkpoint(compute, *inputs, use_reentrant=False)


_draw: Callable[..., Mask | None] | None = None
"""draws the masks of the forward that runs now, with the arguments of `DropoutKeys.mask`"""


def draw_mask(x: torch.Tensor, p: float, caller: nn.Module, first: int = 0) -> Mask | None:
    """Which units of `x` a module drops in the forward that runs now; see `DropoutKeys.mask`. None for no unit.

    Outside of a keyed micro-batch a module drops as torch does.
    """
    if not caller.training or p == 0:
        return None
    return _draw(x, p, caller, first) if _draw is not None else unkeyed_mask(x, p)


@contextlib.contextmanager
def _draw_masks_by(draw: Callable[..., Mask | None]) -> Iterator[None]:
    global _draw
    _draw = draw
    try:
        yield
    finally:
        _draw = None


@contextlib.contextmanager
def dropping_nothing() -> Iterator[None]:
    """Inside, a forward in training mode drops nothing, neither by keys nor by torch."""
    with _draw_masks_by(lambda *call: None), _NoDropout():
        yield


class KeyedDropout(nn.Module):
    """Replaces an `nn.Dropout`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and type as `x`."""
        return dropped(x, draw_mask(x, self.p, self))


def install(model: nn.Module, seed: int) -> DropoutKeys:
    """Replaces the model's own dropout by keyed dropout: in its modules, in PEFT's and in attention.

    The model is of transformers, for sequence classification, perhaps PEFT-wrapped. It is changed in place.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                module.register_module(name, KeyedDropout(child.p).train(child.training))
    backbone = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    _use_keyed_attention(backbone)
    keys = DropoutKeys(seed)
    keys.skips_layers = any("layerdrop" in name and value for name, value in backbone.config.to_dict().items())
    _record_sites(model, keys, backbone.config)
    return keys


def twin_of(model: nn.Module) -> Any:
    """A copy of the model that shares its parameters, for a trial forward that may change modules."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared | {id(buffer): buffer.clone() for buffer in model.buffers()})


def _use_keyed_attention(model: PreTrainedModel) -> None:
    AttentionInterface.register(ATTENTION, keyed_attention)
    AttentionMaskInterface.register(ATTENTION, _whole_mask)
    # A family without transformers' attention interface keeps its own attention. Its dropout may be a module; the probe
    # finds out. A family that chose another attention needs features that SDPA lacks.
    if can_replace_sdpa(model):
        model.set_attn_implementation(ATTENTION)
        for module in model.modules():  # layers of PEFT's layer_replication have their own configurations
            config = getattr(module, "config", None)
            if isinstance(config, PretrainedConfig):
                replace_sdpa(config, ATTENTION)


def _whole_mask(**facts: Any) -> Any:
    """transformers' mask, also where nothing is masked: to find that out, the host would wait for a GPU."""
    return sdpa_mask(**{**facts, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def keyed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with keyed dropout on its probabilities, for transformers' attention interface.

    It calls transformers' own SDPA attention without dropout, for causal models without a mask, and with keywords in
    UNKEYED. `query` is [B, heads, L, head size]; `key` and `value` may have fewer heads, each for several heads of
    queries in a row. A bool `attention_mask`, [B, 1, L, L], is True where attended. Other numbers are added to the
    scores, as `position_bias` is (T5). Returns [B, L, heads, head size].
    """
    unkeyed = any(kwargs.get(name) is not None and kwargs[name] is not False for name in UNKEYED)
    causal = attention_mask is None and getattr(module, "is_causal", False)
    if _draw is None or dropout == 0 or causal or unkeyed:
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if query.shape[1] != key.shape[1]:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        scores = scores + attention_mask
    elif attention_mask is not None:  # adding is cheaper than to fill in every head; the exponential is 0 too
        unattended = torch.zeros_like(attention_mask, dtype=scores.dtype)
        scores += unattended.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min / 2)
    shares = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    shares = shares.to(value.dtype)
    attended = dropped(shares, _draw(shares, dropout, module))
    return torch.matmul(attended, value).transpose(1, 2).contiguous(), None


def _site_of(shape: torch.Size, p: float, length: int) -> Site | None:
    along = tuple(size == length for size in shape[1:])
    if shape[0] != PROBE_BATCH or along not in KINDS:
        return None
    return Site(KINDS[along], next(size for size in shape[1:] if size != length), p)


def _record_sites(model: nn.Module, keys: DropoutKeys, config: PretrainedConfig) -> None:
    """Fills `sites` and `unreached` by one forward of a twin over dummy examples; drops nothing at known sites."""
    twin, device = twin_of(model).train(), next(model.parameters()).device
    origin, calls = dict(zip(twin.modules(), model.modules(), strict=True)), Counter[Hashable]()
    length = _probe_length(model, config)

    def record(x: torch.Tensor, p: float, caller: Hashable, first: int = 0) -> Mask | None:
        calls[caller] += first == 0
        site = _site_of(x.shape, p, length)
        keys.sites[origin[caller], calls[caller]] = site
        return unkeyed_mask(x, p) if site is None else None

    ids = torch.ones(PROBE_BATCH, length, dtype=torch.long, device=device)
    if getattr(config, "is_encoder_decoder", False):  # these classify by the last end token
        ids[:, -1] = config.eos_token_id
    random_state = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with random_state, torch.no_grad(), _RandomOperations(keys.unreached), _draw_masks_by(record):
        twin(input_ids=ids, attention_mask=torch.ones_like(ids))


def _probe_length(model: nn.Module, config: PretrainedConfig) -> int:
    """A length that no size of the model equals, so that an axis of this length is the example's."""
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    sizes.update(value for value in config.to_dict().values() if isinstance(value, int))
    return next(length for length in itertools.count(PROBE_LENGTH) if length not in sizes)


class _NoDropout(TorchFunctionMode):
    """Turns off what else is random in a forward: torch's dropout, the choice of layers to skip, and noise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (nn.functional.dropout, torch.dropout):
            return args[0] if args else kwargs["input"]
        if func is torch.rand:  # layerdrop skips a layer where this is below its probability
            return torch.ones_like(func(*args, **kwargs))
        if func is torch.Tensor.uniform_ and len(args) == 3:  # a router of experts multiplies by noise around 1
            return args[0].fill_((args[1] + args[2]) / 2)
        if func is nn.functional.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


class _RandomOperations(TorchDispatchMode):
    """Collects the names of the random operations that run inside."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(word in name for word in ("dropout", "bernoulli", "rand", "uniform")) and name not in self.found:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
