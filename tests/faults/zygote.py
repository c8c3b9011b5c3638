"""Forks off processes in which the heavy imports are done: a new process and fresh state, without 8 s of importing.

Runs as a process of its own. Reads a request a line (JSON, see harness.py), answers {"pid"} at once and
{"pid", "code", ...} when that process has ended; ends its children and itself when its input ends.
"""

# ruff: noqa: E402 (the package is found only after sys.path has its root)
import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch.utils.tensorboard  # noqa: F401
from peft import AutoPeftModelForSequenceClassification  # noqa: F401

import tests.warm  # noqa: F401
import trainer.export
import trainer.predict
import trainer.report
import trainer.reporting.page
import trainer.run
import trainer.training.loop
import trainer.training.pipeline
import trainer.training.scoring
from tests.faults import points
from trainer.errors import main_guard

ENTRIES = {name: getattr(trainer, name).main for name in ("run", "predict", "export", "report")}


def call(entry, arguments):
    """What the end of trainer/<entry>.py does; returns the exit code."""
    sys.argv = [f"trainer/{entry}.py", *arguments]
    try:
        return main_guard(ENTRIES[entry])
    except SystemExit as leaving:
        return leaving.code or 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1


def fork(request):
    """Starts a process for a request; returns its id."""
    pid = os.fork()
    if pid:
        os.setpgid(pid, request["group"] or pid)
        return pid
    try:
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
        socket.gethostname = lambda: request["host"]
        if not request["report"]:
            trainer.reporting.page.build_report = lambda folder, summary: folder / "report.html"
        for name, *arguments in request["points"]:
            getattr(points, name)(*arguments)
        code = call(request["entry"], request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(70)


def main():
    gc.freeze()  # the collector of a child need not walk through all these libraries
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    os.set_inheritable(answers.fileno(), False)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    children = {}
    pending = b""

    def answer(**values):
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    answer(ready=True)
    while True:
        for key, _ in selector.select():
            if key.fd != 0:
                pid = children.pop(key.fd)
                _, status, usage = os.wait4(pid, 0)
                code = os.waitstatus_to_exitcode(status)
                selector.unregister(key.fd)
                os.close(key.fd)
                answer(pid=pid, code=code, cpu_seconds=usage.ru_utime + usage.ru_stime, at=time.monotonic())
                continue
            received = os.read(0, 1 << 16)
            if not received:
                for pid in children.values():
                    os.kill(pid, signal.SIGKILL)
                return
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                pid = fork(json.loads(line))
                descriptor = os.pidfd_open(pid)
                children[descriptor] = pid
                selector.register(descriptor, selectors.EVENT_READ)
                answer(pid=pid)


if __name__ == "__main__":
    main()
