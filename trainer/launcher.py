"""What launch.sh becomes: `accelerate launch` with signals, an exit code and restarts to rely on.

    python -P trainer/launcher.py [--max-restarts N] <arguments of accelerate launch>

Always holds: a signal is for the ranks, which save and leave, and the launcher stays until they are gone; the exit code
is that of the rank itself, where accelerate makes a 1 and a traceback of it and torchrun a page; and a group starts
again only where nobody asked for its end. A group that lost a process ends as a whole and starts again as a whole, on
each machine by its own launcher: the run continues from its newest checkpoint and needs nothing else of that group.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil

# Exit codes of a rank: ended by its own error, by the user's, and as it missed another (the code for "try again").
CRASHED, MISTAKE, LOST = 1, 2, os.EX_TEMPFAIL
KILLED = 128 + signal.SIGKILL
STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
GROUP = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
PAUSE_SECONDS = 4
# Between two lines about what is waited for, and until it is given up.
TELL_SECONDS, GATHERING_SECONDS = 10, 300
# What torchrun grants the ranks that are left when one has failed, of the half minute in which a group has to be down.
SHUTDOWN_SECONDS = 20


def main() -> int:
    """Runs the group of this machine, and again where it was lost; returns the exit code of its first rank to fail."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--max-restarts", type=int, default=0)
    parser.add_argument("--restart", type=int, default=0)  # how many there were: the launcher's word to itself
    own, arguments = parser.parse_known_args()
    stops = _hand_on_stops()
    code = _run_group(arguments, restarted=own.restart > 0)
    if not stops and _was_lost(code) and own.restart < own.max_restarts:
        _say(f"restart {own.restart + 1} of {own.max_restarts}: {_what_happened(code)}")
        own.restart += 1
        again = [f"--max-restarts={own.max_restarts}", f"--restart={own.restart}", *arguments]
        # Not a loop: what torchrun and its store keep open, the port above all, ends with the program.
        os.execv(sys.executable, [sys.executable, "-P", __file__, *again])
    return code


def _hand_on_stops() -> list[int]:
    """From now on hands the signals that ask for an end on to the ranks; returns the list that those received go to.

    A handler, unlike an ignored signal, is not inherited: until run.py has its own, a signal ends it at once. A thread
    does the work, for the main thread may be in torchrun's C++ and wait for another machine.
    """
    received: list[int] = []
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def hand_on() -> None:
        while True:
            number = os.read(reading, 1)[0]
            if number not in STOPS:  # torchrun has a handler too, for SIGURG
                continue
            received.append(number)
            ranks = psutil.Process().children()
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.send_signal(number)
            if not ranks:
                os._exit(128 + number)

    signal.set_wakeup_fd(writing)
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's & set it
            signal.signal(number, lambda number, frame: None)
    threading.Thread(target=hand_on, daemon=True).start()
    return received


def _run_group(arguments: list[str], restarted: bool) -> int:
    """`accelerate launch` with these arguments; returns 128 + signal for a rank that a signal ended."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch tells of names it cannot resolve
    _clear_environment()
    logging.disable(logging.ERROR)  # torchrun's account of a failed rank, which has itself said why
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun has an option for this, and does not heed it where a rank has failed.
    PContext.close.__defaults__ = (None, int(os.environ.get("PET_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)))
    args = launch_command_parser().parse_args(arguments)
    if restarted:
        _wait_for_the_others(args.main_process_ip, args.main_process_port)
    args.num_machines = args.num_machines or 1
    if args.num_machines > 1:
        meeting = (args.num_machines, int(args.machine_rank), args.main_process_ip, args.main_process_port)
        threading.Thread(target=_tell_who_is_missing, args=meeting, daemon=True).start()
    code = 0
    try:
        launch_command(args)
    except subprocess.CalledProcessError as failure:
        code = failure.returncode
    except ChildFailedError as failure:
        # The first rank to fail; of those in one second not one that torchrun has ended, nor one that missed another.
        causes = {-signal.SIGKILL: 0, LOST: 2, -signal.SIGTERM: 3, 128 + signal.SIGTERM: 3}
        first = min(failure.failures.values(), key=lambda rank: (rank.timestamp, causes.get(rank.exitcode, 1)))
        code = first.exitcode
    except (ConnectionError, DistError) as failure:
        reason = str(failure).partition("\n")[0]
        place = f"{args.main_process_ip}:{args.main_process_port}"
        if args.num_machines > 1 and ("is utilizing it" in reason or "EADDRINUSE" in reason):  # accelerate's, torch's
            _say(f"{place}: the port is in use by another program; set another MASTER_PORT on all machines")
            code = MISTAKE
        else:
            _say(f"rendezvous with the other machines at {place} failed: {reason}")
            code = LOST
    if code < 0:
        _say(f"{_what_happened(128 - code)}; the same command continues the run")
    return code if code >= 0 else 128 - code


def _clear_environment() -> None:
    """This launcher alone says what the group is: torchrun reads every option from a PET_ variable as well."""
    for name in list(os.environ):
        if name in GROUP or (name.startswith("PET_") and name != "PET_SHUTDOWN_TIMEOUT"):
            del os.environ[name]
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGURG"  # one nobody sends: torchrun's handlers would replace ours
    os.environ["ISOTRAIN_LAUNCHER"] = str(os.getpid())


def _tell_who_is_missing(num_nodes: int, node_rank: int, address: str, port: int) -> None:
    """Says every few seconds whom torchrun waits for, until it has started the ranks; gives up after five minutes."""
    began, place = time.monotonic(), f"{address}:{port}"
    while True:
        time.sleep(TELL_SECONDS)
        if psutil.Process().children():
            return
        try:
            socket.create_connection((address, int(port)), timeout=3).close()
            missing = f"the others of {num_nodes} nodes, which meet at MASTER_ADDR:MASTER_PORT {place}"
        except OSError as error:
            missing = f"node 0 at MASTER_ADDR:MASTER_PORT {place}: {error.strerror or error}"
        left = GATHERING_SECONDS - (time.monotonic() - began)
        if left <= 0:
            _say(f"node {node_rank} gives up after {GATHERING_SECONDS} s of waiting for {missing}")
            os._exit(LOST)
        _say(f"node {node_rank} waits for {missing} ({left:.0f} s left)")


def _was_lost(code: int) -> bool:
    """Whether the group did not end by its own decision: not after success, a user's mistake or a stop."""
    return code in (CRASHED, LOST) or (code > 128 and code - 128 not in STOPS)


def _what_happened(code: int) -> str:
    named = {CRASHED: "a process crashed", LOST: "a process was lost", KILLED: "a process was killed (out of memory?)"}
    return named.get(code) or f"a process ended by signal {code - 128}"


def _wait_for_the_others(address: str | None, port: int | None, seconds: float = 30) -> None:
    """Waits until the lost group has ended on every machine, for no rank may meet one of the group before.

    The launcher of the first machine keeps the meeting point of all. It ended with the group, and stays closed for the
    pause, which those of the other machines wait to see; where theirs took longer to end, what they see is the new one.
    """
    deadline = time.monotonic() + seconds
    while address and port and time.monotonic() < deadline:
        try:
            socket.create_connection((address, port), timeout=1).close()
        except OSError:
            break
        time.sleep(0.5)
    time.sleep(PAUSE_SECONDS)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(f"launch.sh: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
