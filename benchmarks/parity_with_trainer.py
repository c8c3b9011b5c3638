"""One optimizer step of transformers.Trainer and of Isotrain, beside plain torch.

    python -m benchmarks.parity_with_trainer        # from the repository's root, in an environment with the pins

The same 16 news items, the same RoBERTa with the same weights, SGD without momentum or clipping, fp32, no dropout. The
only thing that differs is how the 16 are cut: into micro-batches, over processes. That must change nothing, so the
weight change of each step is compared with the reference's: one padded batch, torch's CrossEntropyLoss, one backward.

Isotrain runs as its users run it, as a command; its weights are read from the adapter it saves. A run at learning rate
0 gives the start that all LoRA cases have in common. Trainer is measured on the LoRA model and on the plain one, all of
whose weights train. Writes benchmarks/results/parity_with_trainer.json; exit code 1 where Isotrain is off.
"""

import argparse
import csv
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    PrinterCallback,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from trainer.batching.plan import Plan
from trainer.model.backbone import silence_libraries

ROOT = Path(__file__).resolve().parents[1]
NEWS = ROOT / "trainer" / "recipes" / "quickstart" / "train.csv"
RESULTS = ROOT / "benchmarks" / "results" / "parity_with_trainer.json"
LABELS = ["World", "Sports", "Business", "Sci/Tech"]
LIBRARIES = ["torch", "transformers", "peft", "accelerate"]
NUM_EXAMPLES = 16
LEARNING_RATE = 1.0  # the step subtracts the gradient itself, far above the rounding of the weights
TOLERANCE = 1e-5
SMALL, WHOLE = 160, 100_000  # padded tokens of a micro-batch: a few items, or all of them
TRAINER_CUTS = [(16, 1), (8, 2), (4, 4)]  # batch size x accumulation
ISOTRAIN_CUTS = [(1, WHOLE), (1, SMALL), (2, SMALL)]  # processes, batch.max_tokens


def make_inputs(folder, num_layers=3):
    """Writes backbone/ (configuration, weights drawn from a seed, word-level tokenizer) and train.csv; the rows."""
    with NEWS.open(encoding="utf-8", newline="") as file:
        news = list(csv.DictReader(file))
    each = NUM_EXAMPLES // len(LABELS)
    rows = [row for label in LABELS for row in [row for row in news if row["label"] == label][:each]]
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    tokenizer = word_tokenizer([row["text"] for row in rows])
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=num_layers, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=130, type_vocab_size=1, num_labels=len(LABELS),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    RobertaForSequenceClassification(config).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    return [{"input_ids": tokenizer(row["text"])["input_ids"], "labels": LABELS.index(row["label"])} for row in rows]


def word_tokenizer(texts):
    splitter = pre_tokenizers.Whitespace()
    words = {word.lower(): None for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", model_max_length=128, **names
    )


# --- the model, and what trains of it ---------------------------------------------------------------------------------


def load_model(folder, adapter=None):
    """The plain classifier, or the one with the adapter at its start."""
    model = RobertaForSequenceClassification.from_pretrained(folder / "backbone", dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True) if adapter else model


def trained_tensors(model):
    named = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else dict(model.named_parameters())
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def weight_change(before, after):
    """What a step added to the trained weights, float64 [number of weights]."""
    assert before.keys() == after.keys()
    return np.concatenate([(after[name].double() - before[name].double()).flatten().numpy() for name in sorted(before)])


# --- one step, three ways; each returns its loss and weight change ----------------------------------------------------


def reference_step(model, rows):
    """Plain torch: the whole padded batch, one backward."""
    before = trained_tensors(model.train())
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True, padding_value=1)
    logits = model(input_ids=ids, attention_mask=(ids != 1).long()).logits
    loss = torch.nn.CrossEntropyLoss()(logits, torch.tensor([row["labels"] for row in rows]))
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE).step()
    return loss.item(), weight_change(before, trained_tensors(model))


def trainer_step(model, rows, folder, batch_size, accumulation):
    """transformers.Trainer with nothing but the names of what is asked for."""
    before = trained_tensors(model)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=1, logging_steps=1,
        optim="sgd", learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "backbone")
    trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    return float(loss), weight_change(before, trained_tensors(model))


def isotrain_arguments(folder, name, learning_rate=LEARNING_RATE, max_tokens=WHOLE):
    return [
        "--model.name", str(folder / "backbone"), "--data.train", str(folder / "train.csv"),
        "--data.validation_fraction", "0", "--data.max_length", "128", "--data.label_names", json.dumps(LABELS),
        "--batch.size", str(NUM_EXAMPLES), "--batch.max_tokens", str(max_tokens), "--model.dropout", "0",
        "--peft.r", "8", "--peft.lora_alpha", "16", "--peft.lora_dropout", "0",
        "--peft.target_modules", "[query,value]",
        "--peft.init_lora_weights", "false",  # B is not 0, so that A has a gradient in the first step
        "--optim.name", "sgd", "--optim.learning_rate", str(learning_rate), "--optim.schedule", "constant",
        "--optim.warmup_fraction", "0", "--optim.weight_decay", "0", "--optim.max_grad_norm", "null",
        "--optim.max_steps", "1", "--run.output_dir", str(folder / "runs"), "--run.name", name,
        "--run.precision", "no", "--run.quiet", "true", "--tracking.backends", "[]", "--tracking.every_steps", "1",
    ]  # fmt: skip


def isotrain_run(folder, name, processes, **options):
    """Trains one step as a command; the run's folder."""
    script = [str(ROOT / "trainer" / "run.py"), *isotrain_arguments(folder, name, **options)]
    launcher = []
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"]
        launcher += ["--master-port", str(port)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, *script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        sys.exit(f"Isotrain failed, {name}:\n{done.stderr}")
    return folder / "runs" / name


def isotrain_step(folder, start, name, processes, max_tokens):
    run = isotrain_run(folder, name, processes, max_tokens=max_tokens)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = next(line["train/loss"] for line in lines if "train/loss" in line)
    after = load_file(run / "adapter" / "adapter_model.safetensors")
    return loss, weight_change(load_file(start / "adapter_model.safetensors"), after)


# --- the table --------------------------------------------------------------------------------------------------------


def compared(case, trains, cut, step, reference):
    """A row of the table: a step beside the reference's; `cut` is the examples of each micro-batch, by process."""
    (loss, change), (_, expected) = step, reference
    return {
        "case": case,
        "trains": trains,
        "cut": cut,
        "loss": loss,
        "weight_change": float(np.linalg.norm(change)),
        "ratio": float(np.linalg.norm(change) / np.linalg.norm(expected)),
        "largest_difference": float(np.abs(change - expected).max() / np.abs(expected).max()),
    }


def measure(folder):
    rows = make_inputs(folder)
    start = isotrain_run(folder, "start", 1, learning_rate=0) / "adapter"
    cases = []
    for trains, adapter in (("LoRA and head", start), ("all weights", None)):
        reference = reference_step(load_model(folder, adapter), rows)
        cases.append(compared("plain torch", trains, [[NUM_EXAMPLES]], reference, reference))
        for size, accumulation in TRAINER_CUTS:
            step = trainer_step(load_model(folder, adapter), rows, folder, size, accumulation)
            cases.append(compared("Trainer", trains, [[size] * accumulation], step, reference))
        if adapter:
            for processes, max_tokens in ISOTRAIN_CUTS:
                step = isotrain_step(folder, start, f"{processes}x{max_tokens}", processes, max_tokens)
                cases.append(compared("Isotrain", trains, isotrain_cut(rows, processes, max_tokens), step, reference))
    return rows, cases


def isotrain_cut(rows, processes, max_tokens):
    lengths = np.array([len(row["input_ids"]) for row in rows])
    plan = Plan(lengths, np.ones(NUM_EXAMPLES), NUM_EXAMPLES, seed=0, max_tokens=max_tokens, packed=True)
    parts = [plan.micro_batches(0, rank, processes) for rank in range(processes)]
    return [[len(part.ids) for part in rank if part.weights.any()] for rank in parts]


def markdown(cases):
    """The weight change as a multiple of the reference's, and the largest difference of any one weight."""
    lines = ["| | what trains | micro-batches | logged loss | weight change | off by |", "|---|---|---|---|---|---|"]
    for case in cases:
        cut = " and ".join(" + ".join(map(str, process)) for process in case["cut"])
        numbers = f"{case['loss']:.4f} | {case['ratio']:.6f} | {case['largest_difference']:.1e}"
        lines.append(f"| {case['case']} | {case['trains']} | {cut} | {numbers} |")
    return "\n".join(lines)


def verdicts(cases):
    """Whether Isotrain is right; and, in words, by how much, and what Trainer's factors are."""
    ours = [case for case in cases if case["case"] == "Isotrain"]
    worst = max(max(case["largest_difference"], abs(case["ratio"] - 1)) for case in ours)
    lines = [f"Isotrain: within {worst:.1e} of plain torch (allowed: {TOLERANCE})"]
    cut = [case for case in cases if case["case"] == "Trainer" and len(case["cut"][0]) > 1]
    factors = ", ".join(f"{case['ratio']:.3f} ({case['trains']}, {len(case['cut'][0])} parts)" for case in cut)
    wrong = [case for case in cut if abs(case["ratio"] - 1) > 0.01]
    mended = "" if wrong else ": this version no longer multiplies the step by the number of parts"
    lines.append(f"transformers.Trainer {version('transformers')}: {factors}{mended}")
    return worst <= TOLERANCE, lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        rows, cases = measure(Path(folder))
    right, lines = verdicts(cases)
    result = {
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "lengths": [len(row["input_ids"]) for row in rows],
        "learning_rate": LEARNING_RATE,
        "tolerance": TOLERANCE,
        "cases": cases,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(cases), *lines, sep="\n\n")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
