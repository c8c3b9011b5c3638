"""The check before step 1: the model that trains is the model, and an example's logits are its own.

Always holds: a model that passes gives an example the same logits in training (nothing dropped) and in evaluation,
alone and beside other examples, padded and packed. The check runs in fp32 on a twin of the model and changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from trainer.batching.plan import collate
from trainer.data.corpus import TextSplit
from trainer.data.tokens import Examples
from trainer.dropout.sites import DropoutKeys, install, twin_of
from trainer.errors import UserError, one_line
from trainer.packed.forward import PackedForward, Padding, why_not_packed

NUM_TOKENS = 16, 512
"""fewest and most tokens of the longer example; more than the fewest while parameters x tokens stay below `WORK`"""
WORK = 1e9
NUM_TEXTS = 32
"""rows of the split that the examples are made of"""
TOLERANCE = 2e-5
"""what rounding explains in fp32: a difference of logits, as a fraction of the largest logit or of 1"""


def trial_rows(split: TextSplit, tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, ...]) -> Examples:
    """Examples of at most these lengths, made of a split's first texts; no shorter, unless these are very short."""
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
    names = {"tokens": "input_ids"} | ({"token_types": "token_type_ids"} if pairs else {})
    arrays = {ours: np.concatenate([row[name] for row in rows]) for ours, name in names.items() if name in rows[0]}
    sizes = np.array([len(row["input_ids"]) for row in rows])
    return Examples(
        tokens=arrays["tokens"],
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        token_types=arrays.get("token_types"),
        labels=np.zeros(len(rows), dtype=np.int64),
        lengths=sizes,
    )


def check_start(
    model: PeftModel, seed: int, split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str
) -> tuple[DropoutKeys, Padding]:
    """Installs keyed dropout and tries two examples in every way in which they may be computed.

    Args:
        model: in fp32 on the CPU; its dropout is changed in place.
        seed: of the run.
        split: real texts.
        tokenizer: of the model.
        max_length: longest example in tokens.
        name: of the backbone, for messages.

    Returns:
        the keys of its dropout, and how its examples may share a batch.

    Raises:
        UserError: the model cannot compute them, trains another function than it evaluates, or an example's logits
            depend on the other examples of its batch whatever the padding.
    """
    num_special = tokenizer.num_special_tokens_to_add(pair=split.text_pairs is not None)
    fitting = int(WORK / sum(parameter.numel() for parameter in model.parameters()))
    long = min(max_length, max(NUM_TOKENS[0], min(NUM_TOKENS[1], fitting)))
    short = max(2 * long // 5, num_special)
    try:
        keys = install(model, seed)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            trial = _Trial(twin_of(model).eval(), keys, tokenizer.pad_token_id)
            unequal, equal = (trial_rows(split, tokenizer, (first, short)) for first in (long, short))
            return keys, trial.padding_for(unequal, equal, alike=not reads_longest(model.config, max_length))
    except Refused as reason:
        raise UserError(f"model.name: {name} is not supported: {reason}") from None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: a family's own code meets numbers that it was not written for
        raise UserError(f"model.name: {name} cannot compute an example: {one_line(error)}") from None


class Refused(Exception):
    """Why a model cannot train here."""


@dataclass(frozen=True)
class _Trial:
    """A twin of the model, in evaluation mode. The second example is compared, since it is the one that is padded."""

    model: PeftModel
    keys: DropoutKeys
    pad_token_id: int

    def padding_for(self, unequal: Examples, equal: Examples, alike: bool = True) -> Padding:
        """How the model's examples may share a batch.

        Args:
            unequal: two examples, the second shorter.
            equal: two examples of one length.
            alike: longer examples are computed as these are.

        Raises:
            Refused: none of the ways leaves an example's logits alone.
        """
        padding, rows, alone = Padding(), unequal, self.logits(unequal, [1])
        # keyed masks begin at the first token; padding on the left is for models with dropout that has no keys anyway
        unkeyed = self.keys.unreached or not self.keys.sites
        if not alone.isfinite().all():
            raise Refused("its logits are not finite")
        if not alike or not is_same(self.logits_in_training(rows), alone):  # which of the two is it?
            if not alike or not is_same(self.logits(rows), alone):
                if alike and unkeyed and is_same(self.logits(rows, left=True), alone):
                    padding = Padding(left=True)
                    self.keys.sites = dict.fromkeys(self.keys.sites)
                else:
                    padding, rows, alone = Padding(one_length=True), equal, self.logits(equal, [1])
                    if not is_same(self.logits(rows), alone):
                        raise Refused("the logits of an example depend on the other examples of its batch")
            if not is_same(self.logits_in_training(rows, padding.left), alone):
                raise Refused("in training it computes other logits than in evaluation, though nothing is dropped")
        packs = why_not_packed(self.model) is not None or is_same(self.packed_logits(rows), alone)
        return dataclasses.replace(padding, packs=packs)

    def logits(self, rows: Examples, ids: Sequence[int] = (0, 1), left: bool = False) -> torch.Tensor:
        """The logits [C] of the last of these rows, all in one batch."""
        batch = collate(rows, np.array(ids), np.ones(len(ids)), self.pad_token_id, torch.device("cpu"), left=left)
        logits: torch.Tensor = self.model(**batch.inputs).logits[-1]
        return logits

    def logits_in_training(self, rows: Examples, left: bool = False) -> torch.Tensor:
        """As `logits`, of both rows in training mode."""
        self.model.train()
        with self.keys.dropping_nothing():
            logits = self.logits(rows, left=left)
        self.model.eval()
        return logits

    def packed_logits(self, rows: Examples) -> torch.Tensor:
        """As `logits`, of both rows packed."""
        batch = collate(rows, np.arange(2), np.ones(2), None, torch.device("cpu"))
        return PackedForward(self.model, None)(batch.inputs, batch.lengths)[-1]


def reads_longest(config: Any, max_length: int) -> bool:
    """Whether positions in an example depend on the longest one beside it: LongRoPE's do, above a length."""
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return any(
        rope.get("rope_type") == "longrope" and max_length > (rope.get("original_max_position_embeddings") or 0)
        for rope in (ropes, *ropes.values())  # one, or one for each type of layer
        if isinstance(rope, dict)
    )


def is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether rounding explains the difference of logits; not where one is not finite."""
    scale = max(1.0, expected.abs().max().item())
    return (found - expected).abs().max().item() <= TOLERANCE * scale
