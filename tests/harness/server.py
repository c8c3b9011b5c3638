"""Forks processes off one that has the slow imports done: each has fresh state, without 8 s of importing.

It runs as a process of its own; see processes.py. A message on its socket is a pickled request and one file descriptor.
It answers {"pid"} at once, and {"pid", "code", ...} when that process has ended. When the socket closes, it kills its
children and ends.
"""

import gc
import json
import os
import pickle
import selectors
import signal
import socket
import sys
import time
import traceback
from multiprocessing.connection import Connection

import matplotlib.figure  # noqa: F401
import peft
import sklearn.metrics  # noqa: F401
import torch
import torch.utils.tensorboard
import transformers
from transformers import AutoModelForSequenceClassification, RobertaForSequenceClassification  # noqa: F401

import trainer.training.pipeline  # noqa: F401
from tests.harness import commands
from trainer.config.loading import parse_config
from trainer.model.build import adapter_config


def warm_up():
    """Does once what is slow the first time. It computes nothing: threads that compute would not survive a fork."""
    commands.import_entries()
    torch.set_num_threads(1)
    config = parse_config(["--data.train", "none.csv", "--peft.r", "4", "--peft.target_modules", "[query,value]"])
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(transformers.RobertaConfig(**sizes))
        peft.get_peft_model(model, adapter_config(config.peft, "none"))
    gc.freeze()  # the collector of a child need not walk through all these libraries


def fork(request, end):
    """Starts a process for a request; returns its id."""
    pid = os.fork()
    if pid:
        os.close(end)
        os.setpgid(pid, request["group"] or pid)
        return pid
    code = 70
    try:
        code = run(request, Connection(end))
    except SystemExit as leaving:
        code = leaving.code or 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(request, end):
    """Calls the function that was asked for, in the place that was asked for; returns the exit code."""
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    socket.gethostname = lambda: request["host"]
    function, arguments = pickle.loads(request["call"])
    return function(end, *arguments)


def main():
    warm_up()
    control = socket.socket(fileno=int(sys.argv[1]))
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    children = {}

    def answer(**values):
        control.send(json.dumps(values).encode())

    answer(ready=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is not control:
                pid = children.pop(key.fd)
                _, status, usage = os.wait4(pid, 0)
                code = os.waitstatus_to_exitcode(status)
                selector.unregister(key.fd)
                os.close(key.fd)
                answer(pid=pid, code=code, cpu_seconds=usage.ru_utime + usage.ru_stime, at=time.monotonic())
                continue
            message, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 1)
            if not message:
                for pid in children.values():
                    os.kill(pid, signal.SIGKILL)
                return
            pid = fork(pickle.loads(message), *descriptors)
            descriptor = os.pidfd_open(pid)
            children[descriptor] = pid
            selector.register(descriptor, selectors.EVENT_READ)
            answer(pid=pid)


if __name__ == "__main__":
    main()
