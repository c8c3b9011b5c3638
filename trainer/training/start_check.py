"""The check before step 1: training computes the function that evaluation computes, and no example changes another.

Always holds: a model that passes gives an example the same logits alone and in a batch, padded and packed. So it does
in training, with nothing dropped. The check runs in fp32 on a twin of the model and changes no weight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerBase

from trainer.data.rows import TextSplit
from trainer.data.tokens import Examples
from trainer.dropout.sites import DropoutKeys, dropping_nothing, install, twin_of
from trainer.errors import UserError, one_line
from trainer.model.backbone import NARROW_TYPES
from trainer.packed.families import why_not_packed
from trainer.packed.forward import Forward, PackedForward, PaddedForward, Padding

MIN_TOKENS, MAX_TOKENS = 16, 512
"""limits of the longer example's length"""
MAX_WORK = 1e9
"""limit of parameters x tokens above `MIN_TOKENS`: the check takes seconds at most"""
NUM_TEXTS = 32
"""rows of the split that the examples are made of"""
TOLERANCE = 2e-5
"""of logits in fp32, relative to the largest logit or to 1"""

PRODUCTS = {
    torch.nn.functional.linear, torch.addmm, torch.mm, torch.bmm, torch.matmul, torch.baddbmm, torch.Tensor.mm,
    torch.Tensor.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__,
}  # fmt: skip
DTYPE_OF = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]


def check_start(
    model: PeftModel, seed: int, split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str
) -> tuple[DropoutKeys, Padding]:
    """Installs keyed dropout, then computes two examples in every way that training may.

    The model is on the CPU. Its dropout is replaced in place. `name` is the backbone's, for messages.

    Returns:
        the keys of its dropout, and how its examples may share a batch.

    Raises:
        UserError: the model cannot compute an example, trains another function than it evaluates, or lets an
            example's logits depend on its batch whatever the padding.
    """
    num_special = tokenizer.num_special_tokens_to_add(pair=split.text_pairs is not None)
    affordable = int(MAX_WORK / sum(parameter.numel() for parameter in model.parameters()))
    long = min(max_length, max(MIN_TOKENS, min(MAX_TOKENS, affordable)))
    short = max(2 * long // 5, num_special)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _ProductsInFp32():
            keys = install(model, seed)
            unequal, equal = (make_examples(split, tokenizer, (first, short)) for first in (long, short))
            trials = [(Padding(), unequal), (Padding(left=True), unequal), (Padding(one_length=True), equal)]
            if keys.sites and not keys.unreached:
                del trials[1]  # keyed masks begin at an example's first token, so padding cannot come before it
            if depends_on_longest(model.config, max_length):
                del trials[:-1]
            return keys, find_padding(twin_of(model).eval(), keys, tokenizer.pad_token_id, trials)
    except Refused as reason:
        raise UserError(f"model.name: {name} is not supported: {reason}") from None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a family's code raises many kinds at sizes that it was not written for
        raise UserError(f"model.name: {name} cannot compute an example: {one_line(error)}") from None


def make_examples(split: TextSplit, tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, int]) -> Examples:
    """Two examples of these lengths from a split's first texts; shorter only if the texts are very short."""
    texts = split.texts[:NUM_TEXTS]
    pairs = split.text_pairs[:NUM_TEXTS] if split.text_pairs is not None else texts[:0]
    rows = [
        tokenizer(
            " ".join(texts[start::2] or texts),
            " ".join(pairs[start::2] or pairs) if pairs else None,
            truncation=True,
            max_length=length,
        )
        for start, length in enumerate(lengths)
    ]
    has_types = bool(pairs) and "token_type_ids" in rows[0]
    sizes = np.array([len(row["input_ids"]) for row in rows])
    return Examples(
        tokens=np.concatenate([row["input_ids"] for row in rows]),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        token_types=np.concatenate([row["token_type_ids"] for row in rows]) if has_types else None,
        targets=np.zeros(len(rows), dtype=np.int64),
        lengths=sizes,
    )


class _ProductsInFp32(TorchFunctionMode):
    """Multiplies in fp32, whatever type a frozen matrix is kept in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            args, kwargs = map(_widen, args), {name: _widen(value) for name, value in kwargs.items()}
        if func == DTYPE_OF and args[0].dtype in NARROW_TYPES:
            return torch.float32  # T5 rounds what it multiplies to the type of the matrix
        return func(*args, **kwargs)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in NARROW_TYPES else value


class Refused(Exception):
    """Why a model cannot train here."""


def find_padding(
    twin: PeftModel, keys: DropoutKeys, pad_token_id: int, trials: list[tuple[Padding, Examples]]
) -> Padding:
    """The first padding that leaves an example's logits alone. Of two examples the second is compared: it is padded.

    Raises:
        Refused: no padding does, or training computes other logits.
    """
    for padding, rows in trials:
        forward = PaddedForward(twin, pad_token_id, padding)
        alone = last_logits(forward, rows, [1])
        if not alone.isfinite().all():
            raise Refused("its logits are not finite")
        if is_same(last_logits(forward, rows, [0, 1]), alone):
            break
    else:
        raise Refused("the logits of an example depend on the other examples of its batch")
    if padding.left:
        keys.sites = dict.fromkeys(keys.sites)
    twin.train()
    with dropping_nothing():
        in_training = last_logits(forward, rows, [0, 1])
    twin.eval()
    if not is_same(in_training, alone):
        raise Refused("with nothing dropped, its logits in training differ from those in evaluation")
    packs = why_not_packed(twin) is not None or is_same(last_logits(PackedForward(twin), rows, [0, 1]), alone)
    return dataclasses.replace(padding, packs=packs)


def last_logits(forward: Forward, rows: Examples, ids: list[int]) -> torch.Tensor:
    """Logits [C] of the last of these rows, computed in one batch."""
    batch = forward.collate(rows, np.array(ids), np.ones(len(ids)), torch.device("cpu"))
    return forward(batch.inputs, batch.lengths)[-1]


def depends_on_longest(config: Any, max_length: int) -> bool:
    """Whether an example's positions depend on the longest one in its batch: LongRoPE's do above a length."""
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return any(
        rope.get("rope_type") == "longrope" and max_length > (rope.get("original_max_position_embeddings") or 0)
        for rope in (ropes, *ropes.values())  # one for the model, or one for each type of layer
        if isinstance(rope, dict)
    )


def is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether rounding explains the difference of logits; no if one is not finite."""
    scale = max(1.0, expected.abs().max().item())
    return (found - expected).abs().max().item() <= TOLERANCE * scale
