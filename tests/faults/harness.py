"""Starts the commands as new processes, quickly: a zygote has the imports done and forks (see zygote.py)."""

import atexit
import contextlib
import csv
import functools
import io
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    at: float
    """when, on the monotonic clock"""
    host: str
    """what it took for the name of its machine"""


@dataclass
class Started:
    """A running command."""

    pid: int
    folder: Path
    """with its stdout and stderr"""
    host: str

    def wait(self):
        try:
            answer = zygote().wait(self.pid)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            raise
        said = [(self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        return Ended(answer["code"], *said, answer["cpu_seconds"], answer["at"], self.host)

    def wait_until_stopped(self):
        """Waits until it has stopped itself with SIGSTOP."""
        deadline = time.monotonic() + TIMEOUT
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.02)


def start(entry, arguments, points=(), folder=ROOT, env=None, report=False, first=None):
    """Starts trainer/<entry>.py with these arguments.

    `points` are calls of points.py made before it begins; without `report` run.py's report is left out, to save time.
    It is on a machine and in a process group of its own, or on those of the start `first`.
    """
    process = zygote()
    process.count += 1
    place = Path(process.folder.name) / f"{process.count:04d}"
    place.mkdir()
    # TensorBoard reads event files by name: second, host, process. Two of our starts may fall into one second
    host = first.host if first else f"start{process.count:06d}"
    pid = process.start(
        host=host,
        group=first and first.pid,
        entry=entry,
        arguments=[str(argument) for argument in arguments],
        points=[list(point) for point in points],
        folder=str(folder),
        environment=env or {},
        report=report,
        stdout=str(place / "stdout"),
        stderr=str(place / "stderr"),
    )
    return Started(pid, place, host)


def command(*request, **settings):
    """Runs trainer/<entry>.py to its end; arguments as of `start`."""
    return start(*request, **settings).wait()


def start_ranks(world_size, arguments, points=(), only=None, folders=None, local_world_size=None):
    """Starts trainer/run.py on several ranks of one machine, without a launcher that could hide how they end.

    `points` hold on all ranks; `only` has those of single ranks, and `folders` the folders they work in, by rank.
    They believe that `local_world_size` of them are on a machine.
    """
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(local_world_size or world_size)}
    ranks = []
    for rank in range(world_size):
        started = start(
            "run",
            arguments,
            [*points, *(only or {}).get(rank, ())],
            folder=(folders or {}).get(rank, ROOT),
            env={**meeting, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            first=ranks[0] if ranks else None,
        )
        ranks.append(started)
    return ranks


def wait_all(ranks):
    """How each rank ended; none is left behind, whatever happens."""
    ended = []
    try:
        for rank in ranks:
            ended.append(rank.wait())
    except BaseException:
        for rank in ranks[len(ended) :]:
            if rank.pid not in zygote().ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGKILL)
        raise
    return ended


def on_ranks(*request, **settings):
    """Runs trainer/run.py on several ranks to its end; arguments as of `start_ranks`."""
    return wait_all(start_ranks(*request, **settings))


def free_port():
    """A port nobody listens on, outside the range that the system gives to whoever asks for any."""
    for port in random.Random(time.monotonic_ns()).sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port in 100")


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
        assert found[name] == value, f"{name} differs from the uninterrupted run's"
    steps = [(line["step"], sorted(line)) for line in found["records"]]
    assert len({json.dumps(step) for step in steps}) == len(steps), "a step's numbers stand twice"
    for tag, values in tensorboard(folder).items():
        assert len({step for step, _ in values}) == len(values) or tag.startswith("final/"), (
            f"{tag}: a step is given twice"
        )
    left = [path for path in folder.rglob("*") if "unfinished" in path.name or "pending" in path.name]
    assert not left, "leftovers of a killed writer"


def tensors(path):
    return safetensors.numpy.load_file(path)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def adapters(folder):
    """All tensors a run has learned, by name: those of the best adapter and those of the newest checkpoint."""
    places = {"best": folder / "adapter", "last": checkpoints(folder)[-1]}
    return {
        f"{which} {name}": tensor
        for which, place in places.items()
        for name, tensor in tensors(place / "adapter_model.safetensors").items()
    }


def distance(folder, other):
    """The largest difference between what two runs have learned."""
    ours, theirs = adapters(folder), adapters(other)
    assert ours.keys() == theirs.keys()
    return max(np.abs(ours[name] - theirs[name]).max() for name in ours)


def trained_ids(starts):
    """The ids each step has trained on, from the folders of `log_ids`, one for each start, in their order.

    A step done again counts as done the last time: it is the time whose gradient was applied.
    """
    latest, ids = {}, {}
    for number, folder in enumerate(starts):
        for path in folder.glob("*.jsonl"):
            for line in map(json.loads, path.read_text().splitlines()):
                step, attempt = line["step"], (number, line["attempt"])
                if attempt > latest.get(step, (-1, 0)):
                    latest[step], ids[step] = attempt, []
                if attempt == latest[step]:
                    ids[step] += line["ids"]
    return ids


def assert_each_once(ids, folder):
    """Each example of the training split was computed once in each epoch."""
    summary = json.loads((folder / "summary.json").read_text())
    num_examples = summary["data"]["train"]["num_examples"]
    assert sorted(ids) == list(range(summary["steps"]))
    steps_per_epoch = round(summary["steps"] / summary["epochs"])
    for first in range(0, summary["steps"], steps_per_epoch):
        epoch = [id for step in range(first, first + steps_per_epoch) for id in ids[step]]
        assert sorted(epoch) == list(range(num_examples)), f"epoch of steps {first + 1} to {first + steps_per_epoch}"
