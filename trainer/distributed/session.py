"""What the processes of a run do together: join, agree on settings, choose device and precision, stop on a signal.

An error on any rank stops all ranks with that rank's message.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from trainer.compat import has_fast_bf16, keep_freed_memory
from trainer.distributed import rendezvous
from trainer.distributed.environment import TRUE_WORDS
from trainer.distributed.watch import Watch
from trainer.errors import UserError, one_line

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""long, because other ranks may still tokenize; the watch notices a lost rank sooner"""
NETWORK_HINT = "set the network interface: NCCL_SOCKET_IFNAME on GPUs, GLOO_SOCKET_IFNAME on CPUs"


def is_on_cpu() -> bool:
    """Whether accelerate will choose the CPU."""
    return not torch.cuda.is_available() or _is_cpu_requested()


def _is_cpu_requested() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE_WORDS


def check_device() -> None:
    """Checks that the device is the planned one, and that torch can use all visible GPUs."""
    planned, found = os.environ.get("ISOTRAIN_DEVICE"), "cpu" if is_on_cpu() else "cuda"
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE") or int(os.environ.get("LOCAL_RANK", "0")) + 1)
    if found == "cuda" and num_local > torch.cuda.device_count():
        raise UserError(
            f"{num_local} processes on this machine need a GPU each; torch sees {torch.cuda.device_count()}"
        )
    if found == "cpu" and planned != "cpu" and not _is_cpu_requested() and (num_gpus := _count_listed_gpus()):
        try:
            torch.cuda.init()
            reason = "it finds none"
        except Exception as error:
            reason = str(error).partition("\n")[0]
        raise UserError(
            f"nvidia-smi lists {num_gpus} GPUs that torch {torch.__version__} cannot use: {reason}\n"
            "Install a build of torch that fits the driver, or train on the CPU: ./launch.sh --topology cpu"
        )
    if planned and planned != found:
        raise UserError(
            f"launch.sh planned for {planned} (ISOTRAIN_DEVICE), but torch found {found}; see ./launch.sh --dry-run"
        )


def _count_listed_gpus() -> int:
    """Counts the GPUs that nvidia-smi lists; 0 if CUDA_VISIBLE_DEVICES hides them all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (not visible or visible.startswith("-")):
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def choose_precision(wanted: str, begun: bool = False) -> str:
    """Resolves `run.precision` to no, bf16 or fp16 for the device that accelerate will choose.

    Accelerate's "no" is its default and cannot be told from a choice, so `auto` overrides it.

    Args:
        wanted: the option, or the precision of the run that resumes.
        begun: the run resumes, so its precision cannot change.
    """
    on_cpu = is_on_cpu()
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if wanted == "auto" and launched in {"bf16", "fp16"}:
        wanted = launched
    if wanted == "auto" and on_cpu:
        wanted = "bf16" if has_fast_bf16() else "no"
    elif wanted == "auto":
        wanted = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if wanted == "fp16" and on_cpu:
        hint = "this run began with it: resume it on a GPU, or use --run.name NAME" if begun else "use bf16, no or auto"
        raise UserError(f"run.precision: fp16 on a CPU is dozens of times slower than fp32; {hint}")
    planned = None if begun else os.environ.get("ISOTRAIN_PRECISION")
    if planned in {"no", "fp16", "bf16"} - {wanted}:
        raise UserError(
            f"run.precision is {wanted}, but launch.sh planned {planned}; set --run.precision, or change "
            "mixed_precision in the topology file"
        )
    return wanted


def start_accelerator(precision: str) -> Accelerator:
    """Starts accelerate with the processes of the launcher, in precision no, bf16 or fp16."""
    keep_freed_memory()
    # TF32 has 10 bits of fp32's 23. Some containers choose it by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=is_on_cpu(),  # without a GPU, accelerate would otherwise not connect the processes
            kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
        )
    except ValueError as error:
        raise UserError(f"accelerate: {one_line(error)}") from None
    requested = int(os.environ.get("ISOTRAIN_NUM_PROCESSES") or os.environ.get("WORLD_SIZE") or 1)
    if requested != accelerator.num_processes:
        raise UserError(
            f"{requested} processes were requested (ISOTRAIN_NUM_PROCESSES), but {accelerator.num_processes} started; "
            "see ./launch.sh --dry-run"
        )
    return accelerator


@contextlib.contextmanager
def join_processes(precision: str, facts: Mapping[str, str]) -> Iterator[tuple[Accelerator, Watch]]:
    """Joins the processes of a run and watches them. All that they do together happens inside.

    Args:
        precision: no, bf16 or fp16. Rank 0's counts, because the others may not see the run folder.
        facts: settings that must be equal on all ranks, by name.

    An error on another rank ends this process too.
    """
    watch = Watch()
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            device = "cpu" if is_on_cpu() else "cuda"
            watch.begin(rendezvous.join_ranks({"device": device, "torch": torch.__version__, **facts}))
            precision = watch.share_from_rank_0("precision", precision)
        with _guard_first_collective(watch) if watch.is_active else contextlib.nullcontext():
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
        if watch.is_active:
            watch.wait_for_cause()  # collectives fail if another rank fails
            traceback.print_exc()
            watch.stop_all(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", 1)
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _guard_first_collective(watch: Watch) -> Iterator[None]:
    """Names the setting that helps if the first collective fails. NCCL and gloo choose their own network interfaces."""
    watch.position = "the first all-reduce"
    message = f"the first all-reduce timed out; {NETWORK_HINT}"
    timeout = threading.Timer(rendezvous.RENDEZVOUS_TIMEOUT_SECONDS, watch.stop_all, [message, 2])
    timeout.start()
    try:
        yield
    except RuntimeError as error:
        watch.wait_for_cause()
        raise UserError(f"the first all-reduce failed: {str(error).partition(chr(10))[0]}\n{NETWORK_HINT}") from None
    finally:
        timeout.cancel()


def check_agreement(facts: Mapping[str, str]) -> None:
    """Checks that all processes have the same facts; names the first one that differs, and where."""
    everyone = gather_object([(socket.gethostname(), dict(facts))])
    rendezvous.check_equal([theirs for _, theirs in everyone], [host for host, _ in everyone])


STOP_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT,
    signal.SIGUSR1, signal.SIGUSR2,  # Slurm and others send these before the time limit
)  # fmt: skip


class StopRequest:
    """The first of `STOP_SIGNALS` that arrived; the loop checks it between steps.

    Before training (`deferred` is False) there is nothing to save, so a signal ends the program at once. A second
    Ctrl-C, more than a second after the first, also ends it at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.deferred = False
        self._received = 0.0

    def listen(self) -> bool:
        """Installs the signal handlers; returns False outside the main thread, where Python does not allow it."""
        if threading.current_thread() is not threading.main_thread():
            return False
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._receive)
        return True

    def counts(self) -> list[int]:
        """Returns 1 for the received signal and 0 for the others of `STOP_SIGNALS`, to be summed over ranks."""
        return [int(self.signal == number) for number in STOP_SIGNALS]

    def _receive(self, number: int, frame: Any) -> None:
        # launchers forward signals, so one Ctrl-C may arrive twice in a moment
        is_first, is_repeat = not self.signal, self.signal and time.monotonic() - self._received > 1
        self.signal = self.signal or number
        self._received = time.monotonic()
        if not self.deferred and (is_first or is_repeat):
            raise SystemExit(128 + number)
        if is_repeat and number == signal.SIGINT:
            raise KeyboardInterrupt
