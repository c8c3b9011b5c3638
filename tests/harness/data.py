"""Tiny inputs: rows whose words follow their label, a word-level tokenizer, and a backbone of random weights."""

import csv
import random

from tests.harness.processes import ROOT

AGNEWS = ROOT.parent / "shared" / "agnews"
WORDS = (
    "the a of in on at and to for with match goal team coach season league player win score cup race shares profit "
    "bank market price trade company sales stock deal minister election treaty border court protest troops capital "
    "vote government chip software robot planet cell gene phone network code orbit laser"
).split(" ")
TOPICS = {"World": WORDS[31:41], "Sports": WORDS[10:21], "Business": WORDS[21:31], "Sci/Tech": WORDS[41:]}


def write_csv(path, rows, header=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)
    return path


def topic_rows(count, seed=0):
    """`count` rows of (text, label) whose words follow the label; lengths from 3 to 40 words."""
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


def make_tokenizer():
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


def save_backbone(folder):
    """Writes a RoBERTa of 2 layers, 32 hidden units and random weights, as a hub download would look."""
    import torch
    from transformers import RobertaConfig, RobertaForMaskedLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
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
    tokenizer.save_pretrained(folder)
    return folder
