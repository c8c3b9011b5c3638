"""What --verify trains: random models with a word-level tokenizer, and tables of made-up sentences.

Always holds: the same files on every machine, so that two people can compare their figures.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from trainer.files import write_atomic

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
WORDS = [f"word{number}" for number in range(200)]
NUM_CLASSES = 4


@dataclass(frozen=True)
class Size:
    """The size of a random RoBERTa, and of its table."""

    hidden: int
    layers: int
    heads: int
    num_rows: int
    median_words: float
    max_words: int


# sizes that divide by nothing; the lengths of the larger table are like those of AG News
TINY = Size(hidden=32, layers=2, heads=4, num_rows=61, median_words=16, max_words=44)
MEDIUM = Size(hidden=384, layers=6, heads=12, num_rows=256, median_words=45, max_words=200)


def write_material(folder: Path, size: Size) -> list[str]:
    """Writes a backbone, train.csv and test.csv into a folder; returns the options of run.py that train with them."""
    torch.manual_seed(0)
    backbone = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.hidden,
            max_position_embeddings=size.max_words + 20,
            type_vocab_size=1,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
        )
    )
    backbone.save_pretrained(folder / "backbone")
    _make_tokenizer().save_pretrained(folder / "backbone")
    for seed, (name, num_rows) in enumerate({"train": size.num_rows, "test": size.num_rows // 3}.items()):
        write_atomic(folder / f"{name}.csv", _make_table(size, num_rows, seed))
    return [
        *("--model.name", str(folder / "backbone"), "--data.train", str(folder / "train.csv")),
        *("--data.test", str(folder / "test.csv"), "--data.max_length", str(size.max_words + 2)),
        *("--model.dropout", "0.1", "--peft.r", "4", "--peft.lora_dropout", "0.1"),
        *("--peft.target_modules", "[query,value]", "--tracking.backends", "[]", "--run.output_dir", str(folder)),
    ]


def _make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word, between <s> and </s>."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "pad": "<pad>"}
    tokens = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def _make_table(size: Size, num_rows: int, seed: int) -> str:
    """A table with the columns text and label; half of a text's words tell its label."""
    rng, table = np.random.default_rng(seed), io.StringIO()
    writer = csv.writer(table)
    writer.writerow(("text", "label"))
    words = np.array(WORDS).reshape(NUM_CLASSES + 1, -1)
    for row in range(num_rows):
        label = row % NUM_CLASSES
        num_words = int(np.clip(rng.lognormal(np.log(size.median_words), 0.4), 3, size.max_words))
        chosen = words[
            np.where(rng.random(num_words) < 0.5, label, NUM_CLASSES), rng.integers(len(words[0]), size=num_words)
        ]
        writer.writerow((" ".join(chosen), f"class {label}"))
    return table.getvalue()
