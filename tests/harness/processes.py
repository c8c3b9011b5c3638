"""Starts functions as processes, quickly: a server has the imports done and forks (see server.py)."""

import atexit
import contextlib
import functools
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120
"""seconds after which a process that should have answered or ended counts as stuck"""
ENVIRONMENT = dict(os.environ)
"""before any test: a command that runs in this process changes it"""


class Server:
    """The fork server of this process."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="isotrain-tests-")
        self.ended = {}
        self.count = 0
        environment = {
            **ENVIRONMENT,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": self.folder.name,
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
        }
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(TIMEOUT)
        with theirs:
            command = [sys.executable, "-m", "tests.harness.server", str(theirs.fileno())]
            subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
        atexit.register(self.socket.close)
        assert self.receive() == {"ready": True}

    def receive(self):
        answer = self.socket.recv(1 << 16)
        assert answer, "the fork server has died"
        return json.loads(answer)

    def start(self, request, end):
        socket.send_fds(self.socket, [pickle.dumps(request)], [end])
        while "code" in (answer := self.receive()):
            self.ended[answer["pid"]] = answer
        return answer["pid"]

    def wait(self, pid):
        while pid not in self.ended:
            answer = self.receive()
            self.ended[answer["pid"]] = answer
        return self.ended[pid]


@functools.cache
def server():
    return Server()


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
class Process:
    """A started process."""

    pid: int
    folder: Path
    """with its stdout and stderr"""
    host: str
    end: Connection
    """of a pipe to it; the other end is the first argument of its function"""

    def tell(self, order):
        self.end.send(order)

    def answer(self):
        """What it sends next."""
        assert self.end.poll(TIMEOUT), f"no answer; it said: {self.said()}"
        try:
            return self.end.recv()
        except (EOFError, ConnectionResetError):
            raise AssertionError(f"ended without an answer; it said: {self.said()}") from None

    def said(self):
        """What it has written to stderr so far."""
        return (self.folder / "stderr").read_text(errors="replace")

    def wait(self):
        """Waits until it ends; kills it when that takes too long."""
        try:
            answer = server().wait(self.pid)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"still there after {TIMEOUT} s; it said: {self.said()}") from None
        stdout = (self.folder / "stdout").read_text(errors="replace")
        return Ended(answer["code"], stdout, self.said(), answer["cpu_seconds"], answer["at"], self.host)

    def code(self):
        return self.wait().code

    def kill(self):
        """Kills it, unless it is known to have ended."""
        if self.pid not in server().ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait_until_stopped(self):
        """Waits until it has stopped itself with SIGSTOP."""
        deadline = time.monotonic() + TIMEOUT
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.02)


def start_process(function, *arguments, folder=ROOT, environment=None, host=None, first=None):
    """Starts `function(end, *arguments)`, which returns its exit code, in a process of its own.

    The function must be one that can be imported from the root. The process is on a machine and in a process group of
    its own, or on those of the process `first`.
    """
    forks = server()
    forks.count += 1
    place = Path(forks.folder.name) / f"{forks.count:04d}"
    place.mkdir()
    for name in ("stdout", "stderr"):
        (place / name).touch()
    # TensorBoard reads event files by name: second, host, process. Two of our starts may fall into one second
    host = host or (first.host if first else f"start{forks.count:06d}")
    ours, theirs = socket.socketpair()
    request = {
        "host": host,
        "group": first and first.pid,
        "call": pickle.dumps((function, arguments)),
        "folder": str(folder),
        "environment": environment or {},
        "stdout": str(place / "stdout"),
        "stderr": str(place / "stderr"),
    }
    with theirs:
        pid = forks.start(request, theirs.fileno())
    return Process(pid, place, host, Connection(ours.detach()))


def rank_environment(rank, world_size, port, local_world_size=None):
    """What a launcher would set for a rank of a group on this machine."""
    return {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(local_world_size or world_size),
    }  # fmt: skip


def wait_all(processes):
    """How each process ended; none is left behind, whatever happens."""
    try:
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()


def free_port():
    """A port nobody listens on, outside the range that the system gives to whoever asks for any."""
    for port in random.Random(time.monotonic_ns()).sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port in 100")
