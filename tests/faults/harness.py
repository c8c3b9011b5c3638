"""Starts the commands as new processes, quickly: a zygote has the imports done and forks (see zygote.py)."""

import atexit
import contextlib
import csv
import functools
import io
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.numpy
from tensorboard.backend.event_processing import event_accumulator

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120


class Zygote:
    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="isotrain-faults-")
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": self.folder.name,
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "faults" / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.ended = {}
        self.count = 0
        self.pending = b""
        atexit.register(self.process.stdin.close)
        assert self.answer() == {"ready": True}

    def answer(self):
        while b"\n" not in self.pending:
            ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT)
            if not ready:
                raise TimeoutError(f"a command has run for {TIMEOUT} s")
            received = os.read(self.process.stdout.fileno(), 1 << 16)
            assert received, "the zygote has died"
            self.pending += received
        line, _, self.pending = self.pending.partition(b"\n")
        return json.loads(line)

    def start(self, **request):
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        while "code" in (answer := self.answer()):
            self.ended[answer["pid"]] = answer
        return answer["pid"]

    def wait(self, pid):
        while pid not in self.ended:
            answer = self.answer()
            self.ended[answer["pid"]] = answer
        return self.ended.pop(pid)


@functools.cache
def zygote():
    return Zygote()


@dataclass
class Ended:
    code: int
    """exit code; minus the signal's number where one killed it"""
    stdout: str
    stderr: str
    cpu_seconds: float


@dataclass
class Started:
    """A running command."""

    pid: int
    folder: Path
    """with its stdout and stderr"""

    def wait(self):
        try:
            answer = zygote().wait(self.pid)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            raise
        said = [(self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        return Ended(answer["code"], *said, answer["cpu_seconds"])

    def wait_until_stopped(self):
        """Waits until it has stopped itself with SIGSTOP."""
        deadline = time.monotonic() + TIMEOUT
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.02)


def start(entry, arguments, points=(), folder=ROOT, env=None, report=False):
    """Starts trainer/<entry>.py with these arguments.

    `points` are calls of points.py made before it begins; without `report` run.py's report is left out, to save time.
    """
    process = zygote()
    process.count += 1
    place = Path(process.folder.name) / f"{process.count:04d}"
    place.mkdir()
    pid = process.start(
        number=process.count,
        entry=entry,
        arguments=[str(argument) for argument in arguments],
        points=[list(point) for point in points],
        folder=str(folder),
        environment=env or {},
        report=report,
        stdout=str(place / "stdout"),
        stderr=str(place / "stderr"),
    )
    return Started(pid, place)


def command(*request, **settings):
    """Runs trainer/<entry>.py to its end; arguments as of `start`."""
    return start(*request, **settings).wait()


def changed(arguments, **options):
    """The arguments with some options' values changed or added; `a__b` stands for --a.b, None drops it."""
    result = list(map(str, arguments))
    for name, value in options.items():
        option = "--" + name.replace("__", ".")
        if option in result:
            at = result.index(option)
            del result[at : at + 2]
        if value is not None:
            result += [option, str(value)]
    return result


# --- what a run leaves ------------------------------------------------------------------------------------------------

UNREPEATABLE = ("speed/", "memory/")


def records(folder):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: v for key, v in line.items() if not key.startswith(UNREPEATABLE)} for line in lines]


def checkpoints(folder):
    """Checkpoint folders, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"))


def tensorboard(folder):
    """All scalars of the run's event files as TensorBoard shows them: {tag: [(step, value)]}."""
    events = event_accumulator.EventAccumulator(str(folder), {event_accumulator.SCALARS: 0})
    with contextlib.redirect_stderr(io.StringIO()):
        events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def outcome(folder):
    """All of a finished run that must not depend on how it was interrupted."""
    newest = checkpoints(folder)[-1]
    state = json.loads((newest / "trainer_state.json").read_text())["train"]
    for name in ("resumed_from", "world_sizes"):
        state.pop(name)
    for name in ("run", "epoch", "window"):
        state[name].pop("seconds")
    summary = json.loads((folder / "summary.json").read_text())
    keys = ("steps", "epochs", "best_step", "validation", "test", "adapter_bytes", "padding_fraction", "stopped_early")
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "adapter_config": (folder / "adapter" / "adapter_config.json").read_bytes(),
        "newest": newest.name,
        "weights": (newest / "adapter_model.safetensors").read_bytes(),
        "optimizer": (newest / "optimizer.safetensors").read_bytes(),
        "state": state,
        "records": records(folder),
        "tensorboard": {k: v for k, v in tensorboard(folder).items() if not k.startswith(UNREPEATABLE)},
        "predictions": (folder / "evaluation" / "test" / "predictions.csv").read_bytes(),
        "summary": {key: summary.get(key) for key in keys},
    }


def assert_same(folder, reference):
    """`folder` holds what the uninterrupted run left, to the last bit."""
    found = outcome(folder)
    for name, value in reference.items():
        if isinstance(value, bytes):
            assert found[name] == value, f"{name} differs from the uninterrupted run's"
        else:
            assert found[name] == value
    steps = [(line["step"], sorted(line)) for line in found["records"]]
    assert len({json.dumps(step) for step in steps}) == len(steps), "a step's numbers stand twice"
    for tag, values in tensorboard(folder).items():
        assert len({step for step, _ in values}) == len(values) or tag.startswith("final/"), (
            f"{tag}: a step stands twice"
        )
    left = [path for path in folder.rglob("*") if "unfinished" in path.name or "pending" in path.name]
    assert not left, "leftovers of a killed writer"


def tensors(path):
    return safetensors.numpy.load_file(path)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))
