"""Stands in for trainer/run.py: tells what has reached it, then does as STUB says; with STUB_ONCE only once."""

import json
import os
import signal
import sys
import time
from pathlib import Path

rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
last = rank == world_size - 1


def tell(line: str) -> None:
    """A whole line in one write, for the ranks share stdout."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def lived_before() -> bool:
    marks = Path(f"life-of-{rank}")
    with marks.open("a") as file:
        file.write(".")
    return marks.stat().st_size > 1


def wait_for_a_signal() -> None:
    received: list[int] = []
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(number))
    tell("ready")
    while not received:
        time.sleep(0.05)
    time.sleep(0.5)
    tell("saved")
    sys.exit(128 + received[0])


def behave(behaviour: str) -> None:
    match behaviour:
        case "mistake":
            print("data.train: no such file", file=sys.stderr)
            sys.exit(2)
        case "mistake of the last" if last:
            sys.exit(3)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "loss of the last" if last:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        case "loss of the last" if os.environ.get("STUB_MEETS"):
            try:
                torch.distributed.barrier()
            except RuntimeError:
                sys.exit(os.EX_TEMPFAIL)
        case "loss of the last":  # a rank that nothing tells of it
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        case "long" | "mistake of the last":
            wait_for_a_signal()
        case code if code.isdigit():
            sys.exit(int(code))


told = {"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
if os.environ.get("STUB_MEETS"):
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    told["met"] = [torch.distributed.get_rank(), torch.distributed.get_world_size()]
tell(json.dumps(told))
if not (lived_before() and os.environ.get("STUB_ONCE")):
    behave(os.environ.get("STUB", ""))
if os.environ.get("STUB_MEETS"):
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
