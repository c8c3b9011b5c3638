"""What a run of the quickstart takes besides its arithmetic: the start, and the loop around forward and backward.

    python benchmarks/overhead.py                   # from the repository's root; while nothing else runs; a few minutes

A start is measured from outside, from the command until metrics.jsonl has the line of the first step. Files, tokens and
byte code are cached. The median of several starts counts.

The loop is measured inside this process: the real `loop.train` over the quickstart. Forward, backward and optimizer are
timed. The rest of the wall time is overhead: plan, collation, votes, logging, the progress bar. Drawing masks is part
of the forward. Writes benchmarks/results/overhead.json. Exit code 1 above the limits.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[1])]
    from trainer.distributed.environment import set_environment

    set_environment()  # as trainer/run.py does

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
import time
from importlib.metadata import version
from statistics import median

import torch

from benchmarks.dropout_cost import cpu_name
from trainer.config.loading import parse_config
from trainer.distributed.session import StopRequest, choose_precision, start_accelerator
from trainer.distributed.watch import Watch
from trainer.model.backbone import silence_libraries
from trainer.training import loop
from trainer.training import setup as building
from trainer.training.state import TrainState

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"
LIBRARIES = ["torch", "transformers", "accelerate", "peft"]
COMMANDS = {
    "python trainer/run.py": [sys.executable, "trainer/run.py"],
    "./launch.sh": ["./launch.sh"],
}
MOST_SECONDS, MOST_SHARE = 8.0, 0.02
PATIENCE = 300


def seconds_to_first_step(command, folder):
    """From the start of a command until the first step's line is written; the command is then ended."""
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--recipe", "quickstart", "--run.output_dir", str(folder), "--tracking.every_steps", "1"]
    lines = folder / "quickstart" / "metrics.jsonl"
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([*command, *options], cwd=ROOT, stdout=said, stderr=said)
        try:
            while not (lines.is_file() and lines.stat().st_size):
                if process.poll() is not None or time.perf_counter() - started > PATIENCE:
                    said.seek(0)
                    sys.exit(f"{command}: no first step\n{said.read().decode()}")
                time.sleep(0.01)
            return time.perf_counter() - started
        finally:
            process.terminate()
            process.wait()


def build(folder):
    """What `trainer/run.py --recipe quickstart` trains with."""
    config = parse_config(["--recipe", "quickstart", "--run.output_dir", str(folder)])
    precision = choose_precision(config.run.precision)
    folder.mkdir(exist_ok=True)
    accelerator = start_accelerator(precision)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, precision=precision))
    inputs = building.prepare(config, folder)
    return precision, building.build(config, folder, inputs, accelerator, StopRequest(), Watch())


def share_outside(run):
    """The share of an epoch's steps that is not forward, backward or optimizer."""
    inside = [0.0]

    def timed(function, total):
        def call(*given, **settings):
            started = time.perf_counter()
            try:
                return function(*given, **settings)
            finally:
                total[0] += time.perf_counter() - started

        return call

    forward = run.learner.forward
    object.__setattr__(run.learner, "forward", Timed(forward, timed(forward.__call__, inside)))
    run.learner.accelerator.backward = timed(run.learner.accelerator.backward, inside)
    run.learner.optimizer.step = timed(run.learner.optimizer.step, inside)
    loop.evaluate, evaluate = (lambda run, state, best: (state, best)), loop.evaluate
    loop.save_checkpoint, save = (lambda run, state, best: None), loop.save_checkpoint
    run.log.open(run.config.tracking.backends, 0, 0, run.total_steps, {})
    started = time.perf_counter()
    try:
        loop.train(run, TrainState(), None)
    finally:
        loop.evaluate, loop.save_checkpoint = evaluate, save
        run.log.close()
    return 1 - inside[0] / (time.perf_counter() - started)


class Timed:
    """A forward with another call."""

    def __init__(self, forward, call):
        self.model, self.packed, self.padding, self.call = forward.model, forward.packed, forward.padding, call
        self.collate = forward.collate

    def __call__(self, *given):
        return self.call(*given)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    silence_libraries()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        starts = {
            name: [seconds_to_first_step(command, folder / "runs") for _ in range(1 + chosen.starts)][1:]
            for name, command in COMMANDS.items()
        }
        precision, run = build(folder / "loop")
        share = share_outside(run)
    result = {
        "versions": {name: version(name) for name in LIBRARIES},
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "starts": starts,
        "loop_share": share,
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=2) + "\n")
    for name, seconds in starts.items():
        print(f"{name}: first step after {median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})")
    print(f"loop: {share:.2%} of an epoch's steps is not forward, backward or optimizer")
    return int(median(starts["python trainer/run.py"]) > MOST_SECONDS or share > MOST_SHARE)


if __name__ == "__main__":
    sys.exit(main())
