"""Fixtures for all tests: a tiny backbone with tokenizer, tiny data, and the commands as a user types them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
AGNEWS = ROOT.parent / "shared" / "agnews"
WORDS = (
    "the a of in on at and to for with match goal team coach season league player win score cup race shares profit "
    "bank market price trade company sales stock deal minister election treaty border court protest troops capital "
    "vote government chip software robot planet cell gene phone network code orbit laser"
).split(" ")
TOPICS = {"World": WORDS[31:41], "Sports": WORDS[10:21], "Business": WORDS[21:31], "Sci/Tech": WORDS[41:]}


# before any import of the hub's libraries, which read this once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests start


def pytest_configure(config):
    torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A word-level fast tokenizer over WORDS with <s> ... </s> and padding."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {word: i for i, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=62,
    )


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory, tiny_tokenizer):
    """Folder of a RoBERTa of 2 layers, 32 hidden units and random weights, as a hub download would look."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    folder = tmp_path_factory.mktemp("backbone") / "tiny-roberta"
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def write_csv(path, rows, header=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)
    return path


def topic_rows(count, seed=0):
    """`count` rows of (text, label) whose words follow the label; lengths from 3 to 40 words."""
    import random

    chooser = random.Random(seed)
    rows = []
    for i in range(count):
        label = list(TOPICS)[i % len(TOPICS)]
        words = [
            chooser.choice(TOPICS[label] if chooser.random() < 0.5 else WORDS[:10])
            for _ in range(chooser.randint(3, 40))
        ]
        rows.append((" ".join(words), label))
    return rows


@pytest.fixture
def tiny_data(tmp_path):
    """Folder with train.csv (61 rows) and test.csv (23 rows): sizes that divide by nothing."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_csv(folder / "train.csv", topic_rows(61, seed=1))
    write_csv(folder / "test.csv", topic_rows(23, seed=2))
    return folder


@pytest.fixture
def tiny_arguments(tiny_backbone, tiny_data, tmp_path):
    """Command line of a complete small run (dropout on, several micro-batches a step), about 5 s as a process."""
    return [
        "--model.name", str(tiny_backbone), "--data.train", str(tiny_data / "train.csv"),
        "--data.test", str(tiny_data / "test.csv"), "--data.max_length", "48", "--batch.size", "8",
        "--batch.max_tokens", "100", "--peft.r", "4", "--peft.lora_dropout", "0.1",
        "--peft.target_modules", "[query,value]", "--optim.learning_rate", "1e-3", "--optim.epochs", "2",
        "--run.output_dir", str(tmp_path / "runs"), "--run.name", "tiny", "--run.precision", "no",
        "--checkpoint.every_steps", "3", "--tracking.every_steps", "2",
    ]  # fmt: skip


def run_script(script, arguments, **settings):
    """Runs `python trainer/<script>` as a user would; returns the finished process with its output as text."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **settings.pop("env", {})}
    command = [sys.executable, str(ROOT / "trainer" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, **settings)


@pytest.fixture(scope="session")
def agnews():
    """Folder with a part of AG News, where this checkout has it beside itself."""
    if not AGNEWS.is_dir():
        pytest.skip(f"no AG News data in {AGNEWS}")
    return AGNEWS
