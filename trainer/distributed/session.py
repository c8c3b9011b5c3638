"""The processes of a run: what they do together, and how they stop together.

Always holds: no process waits for one that is gone. Rank 0 and every other rank are joined by a line, a TCP connection
over which both ends show that they live. A process that dies closes its line, so all know at once; one whose network is
cut falls silent, and `SILENCE` seconds later all know that too. An error on any rank stops all ranks, with its message.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from trainer.compat import keep_freed_memory
from trainer.distributed import rendezvous as meeting
from trainer.distributed.environment import TRUE
from trainer.errors import UserError

HEARSAY = 3.0
"""seconds in which a process learns that an error of its own was another's fault"""
COLLECTIVE = timedelta(minutes=30)
"""a collective may take so long: the others may be tokenising; a lost process is noticed sooner"""


def trains_on_cpu() -> bool:
    """Whether accelerate will choose the CPU."""
    return not torch.cuda.is_available() or _told_to_use_cpu()


def check_device() -> None:
    """Makes sure that the device is the one that was planned, and that every GPU that is visible can be used.

    Raises:
        UserError: launch.sh or nvidia-smi sees GPUs that torch cannot use, or too few of them.
    """
    planned, found = os.environ.get("ISOTRAIN_DEVICE"), "cpu" if trains_on_cpu() else "cuda"
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE") or int(os.environ.get("LOCAL_RANK", "0")) + 1)
    if found == "cuda" and num_here > torch.cuda.device_count():
        raise UserError(f"{num_here} processes on this machine need a GPU each; torch sees {torch.cuda.device_count()}")
    if found == "cpu" and planned != "cpu" and not _told_to_use_cpu() and (num_gpus := _num_listed_gpus()):
        try:
            torch.cuda.init()
            reason = "it sees none"
        except Exception as error:
            reason = str(error).partition("\n")[0]
        raise UserError(
            f"nvidia-smi lists {num_gpus} GPUs that torch {torch.__version__} cannot use: {reason}\n"
            "Install a build of torch that fits the driver, or train on the CPU: ./launch.sh --topology cpu"
        )
    if planned and planned != found:
        raise UserError(
            f"launch.sh planned for {planned} (ISOTRAIN_DEVICE), and torch found {found}; see ./launch.sh --dry-run. "
            "To train on the CPU: ./launch.sh --topology cpu"
        )


def _told_to_use_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE


def _num_listed_gpus() -> int:
    """GPUs that nvidia-smi lists, but not where CUDA_VISIBLE_DEVICES hides them all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (not visible or visible.startswith("-")):
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def choose_precision(wanted: str, begun: bool = False) -> str:
    """Turns `run.precision` into no, bf16 or fp16, on the device that accelerate will choose.

    accelerate's own "no" is its default and cannot be told from a choice, so `auto` overrides it.

    Args:
        wanted: the option, or what `auto` came to when the run began.
        begun: the run has begun with it, and cannot change it.

    Raises:
        UserError: fp16 on a CPU.
    """
    on_cpu = trains_on_cpu()
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if wanted == "auto" and launched in {"bf16", "fp16"}:
        wanted = launched
    if wanted == "auto" and on_cpu:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        wanted = "bf16" if fast else "no"
    elif wanted == "auto":
        wanted = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if wanted == "fp16" and on_cpu:
        hint = "this run has begun with it: continue on a GPU, or --run.name NAME" if begun else "use bf16, no or auto"
        raise UserError(f"run.precision: fp16 on a CPU is dozens of times slower than fp32; {hint}")
    planned = None if begun else os.environ.get("ISOTRAIN_PRECISION")
    if planned in {"no", "fp16", "bf16"} - {wanted}:
        raise UserError(
            f"run.precision is {wanted}, and launch.sh planned {planned}; give --run.precision, or change "
            "mixed_precision in the topology's file"
        )
    return wanted


def start_accelerator(precision: str) -> Accelerator:
    """Joins the processes that the launcher started, in precision no, bf16 or fp16.

    Raises:
        UserError: another number of processes than was asked for.
    """
    keep_freed_memory()
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            # without a GPU, accelerate would otherwise leave several processes unaware of one another
            cpu=trains_on_cpu(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE)],
        )
    except ValueError as error:
        raise UserError(f"accelerate: {' '.join(str(error).split())[:240]}") from None
    asked = int(os.environ.get("ISOTRAIN_NUM_PROCESSES") or os.environ.get("WORLD_SIZE") or 1)
    if asked != accelerator.num_processes:
        raise UserError(
            f"{asked} processes were asked for (ISOTRAIN_NUM_PROCESSES), {accelerator.num_processes} came up; see "
            "./launch.sh --dry-run"
        )
    return accelerator


@contextlib.contextmanager
def together(precision: str, facts: Mapping[str, str]) -> Iterator[tuple[Accelerator, Watch]]:
    """Everything that several processes do together happens inside; alone, it is `start_accelerator`.

    Args:
        precision: no, bf16 or fp16; that of rank 0 counts, for the others may not see a run that has begun.
        facts: what must be equal on all processes, by name.

    Raises:
        UserError: the processes do not come up, cannot reach one another, or differ in the facts.
        SystemExit: an error that was told to all processes.
    """
    watch = Watch()
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            device = "cpu" if trains_on_cpu() else "cuda"
            watch.begin(*meeting.meet({"device": device, "torch": torch.__version__, **facts}))
            precision = watch.word_of_rank_0("precision", precision)
        with _first_collective(watch) if watch.watching else contextlib.nullcontext():
            accelerator = start_accelerator(precision)
            total = accelerator.reduce(torch.ones((), device=accelerator.device), "sum")
            assert int(total) == accelerator.num_processes
        yield accelerator, watch
        watch.end()
    except (UserError, OSError) as error:
        watch.stop_all(str(error), 2)
        raise
    except (SystemExit, KeyboardInterrupt) as leaving:
        watch.stop_all("", int(leaving.code or 0) if isinstance(leaving, SystemExit) else 130)
        raise
    except Exception as error:
        if watch.watching:
            time.sleep(HEARSAY)  # a collective fails because of another rank; if so, the watch ends this process now
            traceback.print_exc()
            watch.stop_all(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", 1)
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def agree(facts: Mapping[str, str]) -> None:
    """Makes sure that all processes have the same facts.

    Raises:
        UserError: on all of them, names the first fact that differs and where.
    """
    everyone = gather_object([(socket.gethostname(), dict(facts))])
    meeting.compare([theirs for _, theirs in everyone], [host for host, _ in everyone])


class Watch:
    """This process's ends of the lines: all of them on rank 0, one on every other rank, none where it is alone.

    Rank 0 passes on what it hears. A process that learns of a reason to stop leaves through `os._exit`, for its main
    thread may wait in a collective that never returns; checkpoints are whole at any moment.
    """

    def __init__(self) -> None:
        self.position = "the start"
        """where the main thread is, for messages"""
        self._rank = 0
        self._hosts: list[str] = []
        self._store: Any = None
        self._lines: dict[int, socket.socket] = {}
        self._listeners: list[threading.Thread] = []
        self._sending, self._stopping = threading.Lock(), threading.Lock()
        self._ended = threading.Event()

    @property
    def watching(self) -> bool:
        """Whether there are others."""
        return bool(self._lines)

    def begin(self, rank: int, hosts: list[str], lines: dict[int, socket.socket], store: Any) -> None:
        """Watches the ranks at the other ends of `lines`; `hosts` names the host of every rank.

        The store of the rendezvous is kept, for it may live in this process and the process group meets there too.
        """
        self._rank, self._hosts, self._lines, self._store = rank, hosts, lines, store
        self._listeners = [threading.Thread(target=self._listen, args=(other,), daemon=True) for other in lines]
        for thread in (*self._listeners, threading.Thread(target=self._show_life, daemon=True)):
            thread.start()

    def word_of_rank_0(self, name: str, own: str) -> str:
        """What rank 0 says under a name; `own` is what this rank would say."""
        if self._rank == 0:
            self._store.set(name, own)
        return str(self._store.get(name).decode())

    def end(self) -> None:
        """Waits until all processes have come here; from then on one may go without the others."""
        if self._rank:
            self._ended.set()
            self._send({"end": True})
        for thread in self._listeners:  # each hears the end of the other side, or ends this process
            thread.join()
        if self._rank == 0:
            self._ended.set()
            self._send({"end": True})

    def stop_all(self, message: str, code: int) -> None:
        """Ends all processes with an error of this one; returns only where there are no others."""
        if not self.watching:
            return
        reason = {"rank": self._rank, "message": message, "code": code}
        if self._rank == 0:
            self._leave(reason)
        self._send(reason)
        time.sleep(HEARSAY)  # rank 0 sends back what all are to say, and `_listen` ends this process
        self._leave(reason)

    def _listen(self, other: int) -> None:
        try:
            with self._lines[other].makefile("rb") as messages:
                for message in messages:
                    reason = json.loads(message)
                    if "end" in reason:
                        return
                    if reason:
                        self._leave(reason)
            lost = "its process has ended"
        except TimeoutError:
            lost = f"no sign of life for {meeting.SILENCE:.0f} s; it has stopped, or the network is cut"
        except (OSError, ValueError):
            lost = "its process has ended"
        self._leave({"rank": other, "lost": lost, "code": os.EX_TEMPFAIL})

    def _show_life(self) -> None:
        while not self._ended.wait(meeting.SILENCE / 5):
            self._send({})

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._sending:
            for line in self._lines.values():
                with contextlib.suppress(OSError):  # who listens at the other end learns of it by reading
                    line.sendall(data)

    def _leave(self, reason: dict[str, Any]) -> None:
        """Passes the reason on, says it once a machine, ends this process. The first reason counts."""
        self._stopping.acquire()  # never released: nothing comes after it
        threading.Timer(HEARSAY, os._exit, [reason["code"]]).start()  # where the reader of our words has paused
        try:
            if self._rank == 0:
                self._send(reason)
            self._say(reason)
        finally:  # also where nobody reads what is said
            os._exit(reason["code"])

    def _say(self, reason: dict[str, Any]) -> None:
        rank, lost, message = reason["rank"], reason.get("lost"), reason.get("message")
        where = f"rank {rank} on {self._hosts[rank]}"
        if lost:
            message = (
                f"{where} was lost in {self.position}: {lost}\n"
                "What was saved is whole; the same command continues the run."
            )
        elif rank:
            message = message and f"{where}: {message}"
        here = [other for other, host in enumerate(self._hosts) if host == self._hosts[self._rank]]
        if lost and rank != self._rank and rank in here:  # a lost process says nothing; one that only slept does
            here.remove(rank)
        if message and self._rank == here[0]:
            print(f"\nerror: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()


STOPS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT,
    signal.SIGUSR1, signal.SIGUSR2,  # by which Slurm and others warn before a job's time is over
)  # fmt: skip


class StopRequest:
    """What the signals of `STOPS` leave behind: the number of the first, looked at between steps.

    Before the training (`deferred` is False) there is nothing to save: a signal ends the program at once. So does a
    second Ctrl-C, more than a second after the first.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.deferred = False
        self._received = 0.0

    def listen(self) -> bool:
        """Takes over the signals; returns False in a thread that is not the main one, where Python cannot do that."""
        if threading.current_thread() is not threading.main_thread():
            return False
        for number in STOPS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, self._receive)
        return True

    def counts(self) -> list[int]:
        """1 for the signal received, 0 for all others of `STOPS`: can be summed over ranks."""
        return [int(self.signal == number) for number in STOPS]

    def _receive(self, number: int, frame: Any) -> None:
        # launchers pass a signal on, so that one Ctrl-C may arrive twice within a moment
        first, again = not self.signal, self.signal and time.monotonic() - self._received > 1
        self.signal = self.signal or number
        self._received = time.monotonic()
        if not self.deferred and (first or again):
            raise SystemExit(128 + number)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _first_collective(watch: Watch) -> Iterator[None]:
    """The process group comes up inside, on ways that are not those of our lines: NCCL and gloo choose them themselves.

    Raises:
        UserError: it fails.
    """
    watch.position = "the first all-reduce"
    hint = "name the network that joins the machines: NCCL_SOCKET_IFNAME on GPUs, GLOO_SOCKET_IFNAME on CPUs"
    late = threading.Timer(meeting.GATHERING, watch.stop_all, [f"the first all-reduce does not end; {hint}", 2])
    late.start()
    try:
        yield
    except RuntimeError as error:
        time.sleep(HEARSAY)  # as in `together`
        raise UserError(f"the first all-reduce failed: {str(error).partition(chr(10))[0]}\n{hint}") from None
    finally:
        late.cancel()
