"""The checks of --verify: what each compares, its bound, and what a failure means.

Always holds: a check that cannot run is skipped with the reason, and a check that depends on a failed one is skipped.
So the first row that fails names the fault.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from trainer.errors import UserError
from trainer.verification.environment import find_problems, one_line_summary, read_facts
from trainer.verification.material import MEDIUM, NUM_CLASSES, TINY, write_material
from trainer.verification.ranks import BUDGETS, PARTS, STEPS, relative

ROOT = Path(__file__).parents[2]
LAUNCHER, RUN = ROOT / "trainer/launcher.py", str(ROOT / "trainer/run.py")
TIMEOUT_SECONDS = 300
FP32_BOUND, ADAPTER_BOUND, PROBABILITY_BOUND, ROUNDING_FACTOR = 1e-5, 1e-5, 1e-5, 2.5
"""docs/exactness.md and tests/parity have the same; the last is for 16 bits, times the padded forward's own rounding"""
RUN_STEPS, KILL_STEP = 40, 10
RUN_OPTIONS = (
    *("--run.precision", "no", "--optim.max_steps", str(RUN_STEPS), "--optim.epochs", "6", "--batch.size", "8"),
    *("--optim.learning_rate", "1e-3"),
    *("--batch.max_tokens", "120", "--checkpoint.every_steps", str(KILL_STEP // 2), "--data.validation", "null"),
)

MIN_SPEED = 0.8
"""of packed beside padded, with room for a busy machine"""
ADAPTER = "adapter_model.safetensors"


class Skipped(Exception):
    """Why a check cannot run here."""


class Failed(Exception):
    """What went wrong instead of a figure."""


@dataclass(frozen=True)
class Finding:
    """A figure of a check, and whether it keeps its bound."""

    is_ok: bool
    figure: str
    bound: str = ""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    check: str
    verdict: str
    """ok, FAILED or skipped"""
    figure: str
    """or why it was skipped, or what went wrong"""
    bound: str
    advice: str
    """what a failure means, and what to set meanwhile; "" if it did not fail"""


@dataclass
class Evidence:
    """What the processes of --verify measured. Each is started when the first check needs it."""

    folder: Path
    topology: str
    """of the group: cpu_multi or multi_gpu; cpu or gpu if there is one process"""
    num_processes: int

    @cached_property
    def options(self) -> dict[str, list[str]]:
        """Options of run.py for the tiny and the medium model."""
        sizes = {"tiny": TINY, "medium": MEDIUM}
        return {name: write_material(self.folder / name, size) for name, size in sizes.items()}

    @cached_property
    def one(self) -> dict[str, Any]:
        """What one process measured."""
        return self._measure(1)

    @cached_property
    def several(self) -> dict[str, Any]:
        """What the group measured."""
        if self.num_processes == 1:
            raise Skipped("one process")
        return self._measure(self.num_processes)

    @cached_property
    def run_of_one(self) -> Path:
        """The folder of a finished run of one process."""
        return self._train("one", 1)

    @cached_property
    def run_of_group(self) -> Path:
        """The folder of a finished run of the group."""
        return self._train("group", self.num_processes) if self.num_processes > 1 else self.run_of_one

    def command(self, num_processes: int, *program: str) -> list[str]:
        """What launch.sh starts, with another program in the place of run.py."""
        topology = self.topology if num_processes > 1 else "gpu" if "gpu" in self.topology else "cpu"
        options = ("--dry-run", "--topology", topology, "--processes", str(num_processes))
        plan = [sys.executable, "-P", str(LAUNCHER), "venv", "", *options]
        words = shlex.split(read_output(plan))
        return [*words[: words.index(RUN)], *program]

    def _measure(self, num_processes: int) -> dict[str, Any]:
        """What each part of ranks.py found; the first part that is missing has an error."""
        (self.folder / "options.json").write_text(json.dumps(self.options))
        command = self.command(num_processes, "-m", "trainer.verification.ranks", str(self.folder))
        failure = ""
        try:
            read_output(command)
        except Failed as error:
            failure = str(error)
        path = self.folder / f"ranks-{num_processes}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        if failure:
            missing = next((name for name in PARTS if "error" in found.get(name, {"error": ""})), list(PARTS)[-1])
            found[missing] = {"error": failure, **found.get(missing, {})}
        return found

    def _train(self, name: str, num_processes: int) -> Path:
        read_output(self.command(num_processes, RUN, *self.run_arguments(name)))
        return self.folder / "tiny" / name

    def run_arguments(self, name: str) -> list[str]:
        """Arguments of run.py for a short run of the tiny model."""
        return [*self.options["tiny"], *RUN_OPTIONS, "--run.name", name]


def read_output(command: list[str]) -> str:
    """What a program of this project prints on stdout."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, env=_environment(), **pipes)
    try:
        output, messages = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise Failed(f"no end after {TIMEOUT_SECONDS} s") from None
    if process.returncode:
        lines = [line for line in messages.splitlines() if line.strip()]
        named = [line for line in lines if line.startswith(("error:", "launch.sh:"))] or lines[-1:]
        raise Failed(f"exit code {process.returncode}: {named[0] if named else 'no message'}")
    return output


def kill_all(process: subprocess.Popen[Any]) -> None:
    """Kills a process and all that it started, and waits until they are gone."""
    group: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        group = psutil.Process(process.pid).children(recursive=True)
    for member in (*group, process):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while any(map(_is_running, group)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _is_running(member: psutil.Process) -> bool:
    """Whether a process runs; a zombie does not, which a container may keep."""
    try:
        return bool(member.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # the safe path: a module in the caller's folder hides none of ours or of a library
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own}


def part(found: dict[str, Any], name: str) -> dict[str, Any]:
    """What a part of ranks.py found."""
    if name not in found:
        raise Skipped("the processes ended before it")
    values: dict[str, Any] = found[name]
    if "error" in values:
        raise Failed(values["error"])
    if not values:
        raise Skipped("no GPU")
    return values


# --- the checks -------------------------------------------------------------------------------------------------------


def check_environment(evidence: Evidence) -> Finding:
    """Checks pins and free resources."""
    facts = read_facts()
    problems = find_problems(facts, evidence.num_processes if evidence.topology == "multi_gpu" else 0)
    return Finding(not problems, "; ".join(problems) or one_line_summary(facts), "pins and resources")


def check_reduce(evidence: Evidence) -> Finding:
    """Checks sums over all ranks."""
    found = part(evidence.several, "reduce")
    rate = found["bytes_per_second"] / 2**20
    return Finding(not found["wrong_sums"], f"{found['wrong_sums']} wrong sums, {rate:,.0f} MiB/s", "0 wrong")


def check_micro_batches(evidence: Evidence) -> Finding:
    """Compares gradients of one process: packed and padded, with several token budgets."""
    part(evidence.one, "gradients")
    gradients = load_file(evidence.folder / "gradients-1.safetensors")
    worst = max(
        relative(gradients[f"no {forward} {step} {budget}"], gradients[f"no padded {step} {BUDGETS[0]}"])
        for forward in ("packed", "padded")
        for step in STEPS
        for budget in BUDGETS
    )
    return Finding(worst <= FP32_BOUND, f"{worst:.1e}", f"{FP32_BOUND:.0e}")


def check_precision(evidence: Evidence) -> Finding:
    """Compares the rounding of all ways to compute a gradient in 16 bits with that of the padded whole batch."""
    precision = evidence.one["precision"]
    if precision == "no":
        raise Skipped("run.precision auto is fp32 here")
    gradients = load_file(evidence.folder / "gradients-1.safetensors")

    def rounding(forward: str, step: int, budget: int) -> float:
        exact = gradients[f"no padded {step} {BUDGETS[0]}"]
        return relative(gradients[f"{precision} {forward} {step} {budget}"], exact)

    own = max(rounding("padded", step, BUDGETS[0]) for step in STEPS)
    worst = max(rounding(way, step, budget) for way in ("packed", "padded") for step in STEPS for budget in BUDGETS)
    return Finding(
        worst <= ROUNDING_FACTOR * own, f"{worst:.1e}", f"{ROUNDING_FACTOR * own:.1e}, {ROUNDING_FACTOR} x padded"
    )


def check_processes(evidence: Evidence) -> Finding:
    """Compares the gradients of one process and of the group, case by case, in fp32."""
    part(evidence.several, "gradients")
    one, several = (
        load_file(evidence.folder / f"gradients-{number}.safetensors") for number in (1, evidence.num_processes)
    )
    worst = max(relative(several[name], one[name]) for name in one if name.startswith("no "))
    return Finding(worst <= FP32_BOUND, f"{worst:.1e}", f"{FP32_BOUND:.0e}")


def check_masks(evidence: Evidence) -> Finding:
    """Compares dropout masks of the host and of a GPU."""
    found = part(evidence.one, "masks")
    if not evidence.one["device"].startswith("cuda"):
        raise Skipped("no GPU")
    return Finding(not found["differing"], f"{found['differing']} of {found['units']:,} units differ", "0")


def check_runs(evidence: Evidence) -> Finding:
    """Compares the adapters of short runs of one process and of the group."""
    if evidence.num_processes == 1:
        raise Skipped("one process")
    one, group = (load_last(run, ADAPTER) for run in (evidence.run_of_one, evidence.run_of_group))
    worst = max(float(np.abs(one[name] - group[name]).max()) for name in one)
    return Finding(worst <= ADAPTER_BOUND, f"{worst:.1e} after {RUN_STEPS} steps", f"{ADAPTER_BOUND:.0e}")


def check_resume(evidence: Evidence) -> Finding:
    """Kills a run by SIGKILL, resumes it, and compares its end with that of a run that was left alone."""
    whole, killed = evidence.run_of_group, evidence.folder / "tiny" / "killed"
    command = evidence.command(evidence.num_processes, RUN, *evidence.run_arguments("killed"))
    kill_after_checkpoint(command, killed)
    read_output(command)
    if not json.loads((killed / "summary.json").read_text())["resumed_from"]:
        raise Failed("the run began again at step 0: its checkpoints were not used")
    pairs = [
        (tensor, load_last(killed, file)[name])
        for file in (ADAPTER, "optimizer.safetensors")
        for name, tensor in load_last(whole, file).items()
    ]
    num_equal = sum(one.tobytes() == other.tobytes() for one, other in pairs)
    return Finding(num_equal == len(pairs), f"{num_equal} of {len(pairs)} tensors equal to the bit", "all")


def kill_after_checkpoint(command: list[str], run: Path) -> None:
    """Starts a run, and kills all of its processes when the checkpoint of `KILL_STEP` is there."""
    process = subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint, deadline = run / "checkpoints" / f"step-{KILL_STEP:08d}", time.monotonic() + TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < deadline and not checkpoint.is_dir():
        time.sleep(0.002)
    kill_all(process)
    if not checkpoint.is_dir() or (run / "summary.json").is_file():
        raise Failed(f"no checkpoint of step {KILL_STEP}, or the run ended before it was killed")


def check_scaler(evidence: Evidence) -> Finding:
    """Checks that an overflow in fp16 skips the step and lowers the scale, and that a resume keeps the scale."""
    found = part(evidence.one, "scaler")
    before, after = found["scales"]
    is_ok = found["skipped"] and after < before and found["resumed_scale"] == after
    return Finding(is_ok, f"scale {before:.1e} to {after:.1e}, resumed {found['resumed_scale']:.1e}", "skipped, lower")


def check_memory(evidence: Evidence) -> Finding:
    """Checks that a step is repeated with half of the budget if memory runs out on one rank."""
    found = part(evidence.one if evidence.num_processes == 1 else evidence.several, "memory")
    is_ok = found["halvings"] == 1 and found["difference"] <= FP32_BOUND
    return Finding(is_ok, describe_budget(found), f"halved once, {FP32_BOUND:.0e}")


def describe_budget(found: dict[str, Any]) -> str:
    """The token budgets before and after, and how far the gradient moved."""
    return f"{found['before']} to {found['after']} tokens, {found['difference']:.1e}"


def check_full_gpu(evidence: Evidence) -> Finding:
    """Checks that a step which does not fit is repeated with a budget that fits."""
    found = part(evidence.one, "full_gpu")
    is_ok = found["halvings"] > 0 and found["difference"] <= FP32_BOUND
    return Finding(is_ok, describe_budget(found), f"halved, {FP32_BOUND:.0e}")


def check_packing(evidence: Evidence) -> Finding:
    """Compares the time of steps over packed and over padded examples."""
    found = part(evidence.one, "speed")
    rate, ratio = found["packed_examples_per_second"], found["ratio"]
    return Finding(ratio >= MIN_SPEED, f"{rate:,.0f} examples/s, {ratio:.2f} x padded", f"{MIN_SPEED} x padded")


def check_peak(evidence: Evidence) -> Finding:
    """Tells the share of the matrix product's peak that a training step has. It has no bound."""
    found = part(evidence.one, "speed")
    return Finding(True, f"{found['share_of_peak']:.0%} of {found['peak_flops'] / 1e12:.2f} TFLOP/s")


def check_first_step(evidence: Evidence) -> Finding:
    """Tells how long the first step takes. It has no bound."""
    return Finding(True, f"{part(evidence.one, 'speed')['first_step_seconds']:.2f} s")


def check_reload(evidence: Evidence) -> Finding:
    """Compares the probabilities of a finished run with those of plain PEFT in a new process."""
    run, tiny = evidence.run_of_one, evidence.folder / "tiny"
    with (run / "evaluation/test/predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ours = np.array([[float(row[name]) for name in row if name.startswith("probability:")] for row in rows])
    program = (str(tiny / "backbone"), str(run / "adapter"), str(tiny / "test.csv"), str(NUM_CLASSES))
    command = [sys.executable, "-P", "-m", "trainer.verification.reload", *program]
    worst = float(np.abs(np.array(json.loads(read_output(command))) - ours).max())
    return Finding(worst <= PROBABILITY_BOUND, f"probabilities within {worst:.1e}", f"{PROBABILITY_BOUND:.0e}")


def load_last(run: Path, name: str) -> dict[str, np.ndarray]:
    """Tensors of a run's last checkpoint; the best adapter may be of a step before the kill."""
    return load_file(run / f"checkpoints/step-{RUN_STEPS:08d}" / name)


@dataclass(frozen=True)
class Check:
    """A row of the table before it is filled."""

    name: str
    function: Callable[[Evidence], Finding]
    needs: tuple[str, ...]
    """checks whose failure explains a failure of this one"""
    advice: str


CHECKS = (
    Check("environment", check_environment, (), "install requirements.txt, or free what is short"),
    Check("processes", check_reduce, (), "sums over the processes are wrong or fail: train with one process"),
    Check(
        "gradient, any micro-batches",
        check_micro_batches,
        (),
        "the gradient depends on how a batch is cut: try --model.packed false and verify again",
    ),
    Check(
        "gradient, 16 bits",
        check_precision,
        ("gradient, any micro-batches",),
        "16 bits round more than they should: train with --run.precision no",
    ),
    Check(
        "gradient, 1 and N processes",
        check_processes,
        ("processes", "gradient, any micro-batches"),
        "results depend on the number of processes: train with one process",
    ),
    Check(
        "masks, host and device", check_masks, (), "dropout depends on the device: do not move a run between devices"
    ),
    Check(
        "run, 1 and N processes",
        check_runs,
        ("processes", "gradient, any micro-batches", "gradient, 1 and N processes"),
        "results depend on the number of processes: train with one process",
    ),
    Check(
        "run, killed and resumed",
        check_resume,
        ("processes",),
        "a resumed run ends in another adapter: start interrupted runs again from the beginning",
    ),
    Check("fp16, overflow", check_scaler, (), "fp16 is not safe here: use --run.precision bf16 or no"),
    Check(
        "memory, one rank runs out",
        check_memory,
        ("processes", "gradient, any micro-batches"),
        "set a low --batch.max_tokens",
    ),
    Check("memory, a full GPU", check_full_gpu, ("gradient, any micro-batches",), "set a low --batch.max_tokens"),
    Check("speed, packed", check_packing, (), "padding is faster here: train with --model.packed false"),
    Check("speed, matrix product", check_peak, (), ""),
    Check("speed, first step", check_first_step, (), ""),
    Check(
        "adapter, plain PEFT",
        check_reload,
        (),
        "the saved adapter is not the trained one: do not use it, and report this",
    ),
)


def fill_rows(evidence: Evidence) -> Iterator[Row]:
    """Runs the checks in their order."""
    failed: set[str] = set()
    for check in CHECKS:
        row = _fill_row(check, evidence, [name for name in check.needs if name in failed])
        if row.verdict == "FAILED":
            failed.add(check.name)
        yield row


def _fill_row(check: Check, evidence: Evidence, failed: list[str]) -> Row:
    try:
        if failed:
            raise Skipped(f"needs {failed[0]!r}")
        finding = check.function(evidence)
    except Skipped as reason:
        return Row(check.name, "skipped", str(reason), "", "")
    except (Failed, UserError, OSError, ValueError, LookupError, subprocess.SubprocessError, psutil.Error) as error:
        return Row(check.name, "FAILED", str(error), "", check.advice)
    verdict = "ok" if finding.is_ok else "FAILED"
    return Row(check.name, verdict, finding.figure, finding.bound, "" if finding.is_ok else check.advice)
