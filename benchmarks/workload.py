"""What `compare.py` lets everyone train: examples, backbone and hyperparameters; and how seconds and memory are taken.

Imports none of the contenders: the process of each has loaded nothing of the others.
"""

import csv
import ctypes
import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from trainer.batching.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
SEED, LABELS, MAX_LENGTH = 0, 4, 512
POOL = 4992  # examples: whole batches of 32, 64 and 128
MICRO_BATCH, EVALUATION_BATCH = 16, 32
RANK, ALPHA, DROPOUT = 8, 16, 0.1
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 0.01, 1.0
COMPUTE_TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROBERTA_NAMES = {
    "bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>",
    "unk_token": "<unk>", "pad_token": "<pad>",
}  # fmt: skip
# Share of AG News' texts that have at most so many of roberta-base's tokens (4,999 texts; mean 54.2).
LENGTHS = {
    0: 20, 0.01: 26, 0.05: 32, 0.1: 36, 0.25: 44, 0.5: 52, 0.75: 61, 0.9: 71, 0.95: 82, 0.98: 112, 0.99: 122,
    0.995: 132, 0.999: 199, 1: 279,
}  # fmt: skip


@dataclass(frozen=True)
class Backbone:
    """A shape, whose weights are drawn at random, and how much of it a CPU trains in a pass."""

    config: Callable[[], PreTrainedConfig]
    examples_a_pass: int
    passes: int = 3
    targets: Sequence[str] = ("query", "value")


MINILM = {
    "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536,
}  # fmt: skip
ELECTRA_BASE = {
    "embedding_size": 768, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
}  # fmt: skip
BACKBONES = {
    "roberta-base": Backbone(
        lambda: RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1), 128, passes=5
    ),
    "minilm": Backbone(lambda: BertConfig(**MINILM), 512, passes=5),
    "distilbert": Backbone(DistilBertConfig, 192, targets=("q_lin", "v_lin")),
    "electra": Backbone(lambda: ElectraConfig(**ELECTRA_BASE), 96),
    "mpnet": Backbone(lambda: MPNetConfig(max_position_embeddings=514), 96, passes=5, targets=("q", "v")),
    "modernbert": Backbone(ModernBertConfig, 96, targets=("Wqkv",)),
}
"""the base size of each family"""


@dataclass(frozen=True)
class Task:
    """What a contender is made from."""

    folder: Path
    """holds backbone/ (configuration, weights, tokenizer) and train.csv"""
    batch: int
    """examples of an optimizer step"""
    precision: str
    """no, bf16 or fp16"""
    device: str
    targets: Sequence[str] = ("query", "value")
    """what LoRA is put on"""


@dataclass(frozen=True)
class Pass:
    """One stretch of work, timed."""

    seconds: float
    examples: int
    tokens: int
    """without padding"""
    positions: int
    """what was computed, padding included"""


# --- inputs -----------------------------------------------------------------------------------------------------------


def generated_rows(number, lengths=LENGTHS):
    """(text, class) of texts of made-up words, a token each, whose lengths with <s> and </s> follow the quantiles."""
    random = np.random.default_rng(SEED)
    shares = np.linspace(0, 1, number)
    sizes = np.interp(shares, list(lengths), list(lengths.values())).round().astype(int)
    words = np.array(made_up_words())
    texts = [" ".join(random.choice(words, size - 2)) for size in random.permutation(sizes)]
    return [(text, i % LABELS) for i, text in enumerate(texts)]


def made_up_words():
    syllables = ["ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru"]
    return ["".join(three) for three in itertools.product(syllables, repeat=3)]


def read_rows(file):
    """(text, class) of a csv with the columns text and label; classes are numbered as their names sort."""
    with Path(file).open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    names = sorted({row["label"] for row in rows})
    return [(row["text"].strip(), names.index(row["label"])) for row in rows]  # as Isotrain reads them


def word_tokenizer(texts):
    splitter = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **ROBERTA_NAMES)


def read_tokenizer(folder):
    """The tokenizer of a folder; one with nothing but tokenizer.json is roberta-base's."""
    if (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), model_max_length=MAX_LENGTH, **ROBERTA_NAMES
    )


def write_inputs(folder, config, rows, tokenizer):
    """Writes backbone/, its weights drawn from a seed, and train.csv."""
    config.num_labels = max(label for _, label in rows) + 1
    for name, value in config.to_dict().items():
        if "dropout" in name and isinstance(value, float):
            setattr(config, name, DROPOUT)
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(SEED)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def read_features(folder):
    """The tokenizer, and the examples as transformers' collators take them."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "backbone")
    rows = read_rows(folder / "train.csv")
    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    return tokenizer, [{"input_ids": ids, "labels": label} for ids, (_, label) in zip(encoded, rows, strict=True)]


def plan_of(lengths, batch):
    """Which examples a step trains, as Isotrain has them: the same for everyone."""
    return Plan(np.asarray(lengths), np.ones(len(lengths)), batch, SEED, max_tokens=1)


def num_layer_weights(config):
    """Weights of the backbone's layers."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    layers = next(module for module in model.base_model.modules() if isinstance(module, torch.nn.ModuleList))
    return sum(parameter.numel() for parameter in layers.parameters())


# --- measuring --------------------------------------------------------------------------------------------------------


def clock(device):
    """Seconds, once the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_peak(device, compute_type, seconds=0.5):
    """FLOP/s of the best of some products of square matrices."""
    size = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(compute_type) for _ in range(2))
    product, best = left @ right, float("inf")
    end = clock(device) + seconds
    while (started := clock(device)) < end:
        torch.matmul(left, right, out=product)
        best = min(best, clock(device) - started)
    return 2 * size**3 / best


def serve(arguments, build):
    """The entry of a contender's process: does what it reads, and answers each line with one, both of JSON.

    Before the first line two steps, one with the longest example of all: an epoch meets it sooner or later. The first
    answer tells what memory they took, and which tokens it has read.

    Args:
        arguments: what a `Task` is made from, and what else `build` takes.
        build: makes the contender of a `Task`.
    """
    folder, batch, precision, device, targets, *others = arguments
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer

    def answer(found):
        print(json.dumps(found), file=answers, flush=True)

    libraries = peak_of_process()
    contender = build(Task(Path(folder), int(batch), precision, device, targets.split(",")), *others)
    plan = plan_of(contender.lengths, int(batch))
    longest = int(np.argmax(contender.lengths))
    first = next(step for step in range(plan.steps_per_epoch) if longest in plan.global_batch(step))
    contender.train(range(first, first + 2))
    memory = {"libraries": libraries, "process": peak_of_process()}
    if device == "cuda":
        memory["device"] = torch.cuda.max_memory_allocated()
    return_memory()
    answer({"memory": memory, "tokens": hashlib.sha256(contender.tokens.astype(np.int64)).hexdigest()})
    for line in sys.stdin:
        what, *span = json.loads(line)
        if what == "parity":
            answer(contender.parity())
            continue
        before = matrix_peak(device, COMPUTE_TYPES[precision])
        found = getattr(contender, what)(range(*span))
        after = matrix_peak(device, COMPUTE_TYPES[precision])
        answer({**dataclasses.asdict(found), "peak": (before + after) / 2})


def return_memory():
    """Returns freed memory to the system. Otherwise each process would hold gigabytes after its longest step."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if malloc_trim is not None:
        malloc_trim(0)


def peak_of_process():
    """Bytes of memory that this program has held at most.

    Not getrusage's ru_maxrss: that survives exec, so a child would begin with its parent's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
