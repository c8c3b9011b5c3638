"""What each rank of --verify measures, as `python -m trainer.verification.ranks FOLDER` under the launcher.

Rank 0 writes what it found into FOLDER after each part. checks.py compares the files of two numbers of processes.
A part that fails is named in the file with its error.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from accelerate import Accelerator

from trainer.batching.plan import Plan
from trainer.compat import forget_precision
from trainer.config.loading import parse_config
from trainer.distributed.environment import read_environment, set_environment
from trainer.distributed.session import StopRequest, choose_precision, join_processes, start_accelerator
from trainer.distributed.watch import Watch
from trainer.dropout.masks import Masks, Site
from trainer.errors import main_guard, one_line
from trainer.files import write_atomic
from trainer.model.backbone import silence_libraries
from trainer.training.checkpoint import load_newest, restore, save_checkpoint
from trainer.training.loop import shrink_token_budget
from trainer.training.records import Run, current_plan
from trainer.training.setup import build, prepare
from trainer.training.state import TrainState
from trainer.training.step import StepResult, train_step

BATCH_SIZE, BUDGETS, STEPS = 8, (10**6, 120, 48), (0, 3, 7)  # the last step of the epoch has 5 of 61 examples
ADAPTER_BYTES, LARGE_BYTES = 4 * 2**20, 64 * 2**20
TIMED_STEPS, MATRIX_SIZE = 4, 2048
FREE_GPU_BYTES = 2**28
"""for a step of the medium model that needs more"""
HUGE_SCALE = 2.0**60
"""of fp16's losses: every gradient overflows"""


@dataclass(frozen=True)
class Setting:
    """What a rank needs to build runs."""

    folder: Path
    tiny: list[str]
    """options of run.py for the tiny model"""
    medium: list[str]
    accelerator: Accelerator
    watch: Watch
    precision: str
    """what run.precision auto chooses on this machine"""

    def build(self, options: list[str], *more: str) -> Run:
        """A run, set up as run.py does; its precision is the accelerator's."""
        precision = str(self.accelerator.mixed_precision)
        config = parse_config(
            [*options, "--run.precision", precision, "--run.name", "ranks", "--run.quiet", "true", *more]
        )
        folder = self.folder / "ranks"
        return build(config, folder, prepare(config, folder), self.accelerator, StopRequest(), self.watch)

    def in_precision(self, precision: str) -> Setting:
        """The same in another precision."""
        forget_precision()
        return dataclasses.replace(self, accelerator=start_accelerator(precision))


def main() -> int:
    """Measures every part; returns the exit code."""
    folder = Path(sys.argv[1])
    read_environment()
    set_environment()
    silence_libraries()
    precision = choose_precision("auto")
    with join_processes("no", {}) as (accelerator, watch):
        options = json.loads((folder / "options.json").read_text())
        setting = Setting(folder, options["tiny"], options["medium"], accelerator, watch, precision)
        found: dict[str, Any] = {"precision": precision, "device": str(accelerator.device)}
        for name, part in PARTS.items():
            watch.position = f"the part {name} of --verify"
            try:
                found[name] = part(setting)
            except Exception as error:
                found[name] = {"error": one_line(error)}
                raise
            finally:
                if accelerator.is_main_process:
                    text = json.dumps(found, indent=2) + "\n"
                    write_atomic(folder / f"ranks-{accelerator.num_processes}.json", text)
    return 0


def reduce(setting: Setting) -> dict[str, Any]:
    """Sums over the ranks: their error, and the bytes per second of a large one."""
    accelerator = setting.accelerator
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    pattern = torch.arange(ADAPTER_BYTES // 4, device=device, dtype=torch.float32) % 1000
    total = accelerator.reduce((rank + 1) * pattern, "sum")
    wrong = int((total != world_size * (world_size + 1) // 2 * pattern).sum())
    large = torch.ones(LARGE_BYTES // 4, device=device)
    seconds = []
    for _ in range(3):
        _synchronize(device)
        start = time.perf_counter()
        accelerator.reduce(large, "sum")
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {"wrong_sums": wrong, "bytes_per_second": LARGE_BYTES / min(seconds)}


def gradients(setting: Setting) -> dict[str, Any]:
    """Writes the gradients of some steps, for each precision, forward and token budget."""
    found: dict[str, np.ndarray] = {}
    for precision in dict.fromkeys(("no", setting.precision)):
        there = setting if precision == "no" else setting.in_precision(precision)
        for forward in ("packed", "padded"):
            run = there.build(setting.tiny, "--model.packed", str(forward == "packed").lower(), *GRADIENT_OPTIONS)
            for step in STEPS:
                for budget in BUDGETS:
                    gradient, _ = step_gradient(run, step, dataclasses.replace(run.plan, max_tokens=budget))
                    found[f"{precision} {forward} {step} {budget}"] = gradient
    if precision != "no":
        setting.in_precision("no")
    if setting.accelerator.is_main_process:
        name = f"gradients-{setting.accelerator.num_processes}.safetensors"
        write_atomic(setting.folder / name, safetensors.numpy.save(found))
    return {"cases": len(found)}


GRADIENT_OPTIONS = ("--batch.size", str(BATCH_SIZE), "--optim.max_grad_norm", "null")


def step_gradient(run: Run, step: int, plan: Plan) -> tuple[np.ndarray, StepResult]:
    """The gradient that the optimizer gets in a step, [P], and the result of the step; the weights stay."""
    learner, seen = run.learner, list[torch.Tensor]()
    before = [parameter.detach().clone() for parameter in learner.parameters.values()]

    def keep(*_: Any) -> None:
        seen[:] = [p.grad.detach().flatten().float() for p in learner.parameters.values() if p.grad is not None]

    hook = learner.optimizer.optimizer.register_step_pre_hook(keep)
    accelerator = learner.accelerator
    now = dataclasses.replace(run, plan=plan)
    parts = plan.micro_batches(step, accelerator.process_index, accelerator.num_processes)
    result = train_step(now, step, parts)
    hook.remove()
    with torch.no_grad():
        for parameter, old in zip(learner.parameters.values(), before, strict=True):
            parameter.copy_(old)
    return torch.cat(seen or [torch.zeros(0)]).cpu().numpy(), result


def masks(setting: Setting) -> dict[str, Any]:
    """Counts units whose masks differ between the host and the device."""
    device = setting.accelerator.device
    sites = [Site("tokens", 48, 0.1), Site("attention", 4, 0.3), Site("pooled", 33, 0.6)]
    ids, lengths = np.arange(5), np.array([31, 17, 16, 2, 1])
    shapes = [(5, 31, 48), (5, 4, 31, 31), (5, 33)]
    differing = 0
    for number, shape in enumerate(shapes):
        drawn = Masks(sites, 7, 3, ids, lengths)
        host, there = (drawn.keep(number, shape, 0, place).cpu() for place in (torch.device("cpu"), device))
        differing += int((host != there).sum())
    return {"differing": differing, "units": sum(int(np.prod(shape)) for shape in shapes)}


def memory(setting: Setting) -> dict[str, Any]:
    """Lets memory run out on the last rank, halves the budget, and repeats the step."""
    run = setting.build(setting.tiny, *GRADIENT_OPTIONS)
    rank, world_size = setting.accelerator.process_index, setting.accelerator.num_processes
    whole, _ = step_gradient(run, 0, run.plan)
    forward: Any = _RunsOut(run.learner.forward, is_due=rank == world_size - 1)
    run = dataclasses.replace(run, learner=dataclasses.replace(run.learner, forward=forward))
    return {**_repeat_until_it_fits(run, whole), "before": max(run.plan.sizes(0, world_size))[0]}


def full_gpu(setting: Setting) -> dict[str, Any]:
    """Lets a step run out of a GPU's memory, most of which is locked."""
    device = setting.accelerator.device
    if device.type != "cuda" or setting.accelerator.num_processes > 1:
        return {}
    run = setting.build(setting.medium, "--batch.size", "256", "--optim.max_grad_norm", "null")
    whole, _ = step_gradient(run, 0, run.plan)
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_allocated(device) + FREE_GPU_BYTES
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(device).total_memory, device)
    found = {**_repeat_until_it_fits(run, whole), "before": max(run.plan.sizes(0, 1))[0]}
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    return found


def _repeat_until_it_fits(run: Run, whole: np.ndarray) -> dict[str, Any]:
    """Repeats step 0 with half of the budget until memory suffices, as the loop does."""
    state, num_halvings = TrainState(), 0
    while True:
        gradient, result = step_gradient(run, 0, current_plan(run, state))
        if not result.out_of_memory:
            break
        num_halvings, state = num_halvings + 1, shrink_token_budget(run, state, current_plan(run, state))
    return {"halvings": num_halvings, "after": state.max_tokens, "difference": relative(gradient, whole)}


class _RunsOut:
    """A forward whose first call runs out of memory on one rank."""

    def __init__(self, forward: Any, is_due: bool) -> None:
        self._forward, self._is_due = forward, is_due

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)

    def __call__(self, *inputs: Any) -> torch.Tensor:
        if self._is_due:
            self._is_due = False
            raise torch.OutOfMemoryError
        logits: torch.Tensor = self._forward(*inputs)
        return logits


def scaler(setting: Setting) -> dict[str, Any]:
    """On a GPU, in fp16: lets a gradient overflow, trains on, saves, and resumes."""
    if setting.accelerator.device.type != "cuda":
        return {}
    there = setting.in_precision("fp16")
    found = overflow(there.build(setting.tiny, *GRADIENT_OPTIONS), there.build(setting.tiny, *GRADIENT_OPTIONS))
    setting.in_precision("no")
    return found


def overflow(run: Run, other: Run) -> dict[str, Any]:
    """Makes the scale of a run in fp16 overflow; then resumes its checkpoint in another run."""
    parameters, scaler = list(run.learner.parameters.values()), run.learner.accelerator.scaler
    before = [parameter.detach().clone() for parameter in parameters]
    scaler.load_state_dict({**scaler.state_dict(), "scale": HUGE_SCALE})
    rank, world_size = run.learner.accelerator.process_index, run.learner.accelerator.num_processes
    train_step(run, 0, run.plan.micro_batches(0, rank, world_size))
    skipped = all(torch.equal(old, parameter) for old, parameter in zip(before, parameters, strict=True))
    scale = scaler.get_scale()
    save_checkpoint(run, TrainState(step=1), None)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1.0})
    checkpoint, _ = load_newest(run.folder / "checkpoints")
    assert checkpoint is not None
    restore(other, checkpoint)
    return {
        "skipped": skipped,
        "scales": [HUGE_SCALE, scale],
        "resumed_scale": other.learner.accelerator.scaler.get_scale(),
    }


def speed(setting: Setting) -> dict[str, Any]:
    """Times steps of packed and of padded examples in turn, on one process."""
    if setting.accelerator.num_processes > 1:
        return {}
    there, device = setting.in_precision(setting.precision), setting.accelerator.device
    options = ("--batch.size", "32")
    runs = {name: there.build(setting.medium, "--model.packed", packed, *options) for name, packed in FORWARDS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(1 + TIMED_STEPS):
        for name, run in runs.items():
            _synchronize(device)
            start = time.perf_counter()
            train_step(run, step, run.plan.micro_batches(step, 0, 1))
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    packed = runs["packed"]
    tokens = statistics.median(packed.plan.num_tokens(step) for step in range(1, 1 + TIMED_STEPS))
    typical = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    named = packed.learner.model.named_parameters()
    weights = sum(p.numel() for name, p in named if ".encoder." in name and p.ndim == 2 and not p.requires_grad)
    peak = _matrix_flops(device, there.precision)
    setting.in_precision("no")
    return {
        "packed_examples_per_second": 32 / typical["packed"],
        "ratio": typical["padded"] / typical["packed"],
        "first_step_seconds": seconds["packed"][0],
        # two operations a weight and token forward, and two for the gradient of the input
        "share_of_peak": 4 * weights * tokens / typical["packed"] / peak,
        "peak_flops": peak,
    }


FORWARDS = {"packed": "true", "padded": "false"}


def _matrix_flops(device: torch.device, precision: str) -> float:
    """Operations per second of a large matrix product in this precision."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    matrix, seconds = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device).to(dtype), []
    for _ in range(6):
        _synchronize(device)
        start = time.perf_counter()
        matrix @ matrix
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * MATRIX_SIZE**3 / min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference, relative to that of `expected`."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected)) if found.size == expected.size else np.inf


PARTS = {
    "reduce": reduce, "gradients": gradients, "masks": masks, "memory": memory, "full_gpu": full_gpu,
    "scaler": scaler, "speed": speed,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main_guard(main))
