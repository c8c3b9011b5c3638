"""Tiny inputs: rows whose words follow their label, a tokenizer, a random backbone, and the options of a small run."""

import csv
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq

from tests.harness.processes import ROOT

AGNEWS = ROOT.parent / "shared" / "agnews"
WORDS = (
    "the a of in on at and to for with match goal team coach season league player win score cup race shares profit "
    "bank market price trade company sales stock deal minister election treaty border court protest troops capital "
    "vote government chip software robot planet cell gene phone network code orbit laser"
).split(" ")
TOPICS = {"World": WORDS[31:41], "Sports": WORDS[10:21], "Business": WORDS[21:31], "Sci/Tech": WORDS[41:]}
# A small run: dropout on, several micro-batches a step; a__b stands for --a.b.
OPTIONS = {
    "data__max_length": 48,
    "data__validation_fraction": 0.3,
    "batch__size": 8,
    "batch__max_tokens": 100,
    "batch__eval_max_tokens": 120,
    "model__dropout": 0.1,
    "peft__r": 4,
    "peft__lora_dropout": 0.1,
    "peft__target_modules": "[query,value]",
    "optim__learning_rate": "2e-2",
    "optim__epochs": 2,
    "optim__label_smoothing": 0.1,
    "evaluation__every_steps": 4,
    "evaluation__metric": "loss",
    "run__name": "run",
    "run__precision": "no",
    "checkpoint__every_steps": 3,
    "tracking__every_steps": 2,
}


def write_csv(path, rows, header=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)
    return path


def write_labelled(path, labels):
    """A file of one text for each label, by its ending: csv as text, json and parquet by type."""
    texts = [f"text {i}" for i in range(len(labels))]
    if path.suffix == ".csv":
        return write_csv(path, zip(texts, labels, strict=True))
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts, "label": labels}), path)
        return path
    rows = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(rows) if path.suffix == ".jsonl" else f"[{','.join(rows)}]")
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


# Families that have a packed forward of their own: targets of LoRA, and sizes by their own names.
OTHER_FAMILIES = {
    "mpnet": ("[q,v]", {}),
    "distilbert": ("[q_lin,v_lin]", {"hidden_dim": 64}),
    "electra": ("[query,value]", {"embedding_size": 24}),
    "modernbert": ("[Wqkv,Wi]", {"local_attention": 8, "cls_token_id": 0, "sep_token_id": 2}),
    "qwen3": ("[q_proj,v_proj,up_proj]", {"num_key_value_heads": 2, "head_dim": 12}),
}


def save_backbone(folder, family="roberta", **sizes):
    """Writes a backbone of 2 layers, 32 hidden units and random weights, as a hub download would look."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
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
        **sizes,
    )
    kinds = {"modernbert": AutoModelForMaskedLM, "qwen3": AutoModelForCausalLM}
    kinds.get(family, AutoModelForPreTraining).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
