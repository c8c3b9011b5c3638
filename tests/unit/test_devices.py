"""Memory that is freed stays at hand."""

import os
import subprocess
import sys

SCRIPT = """
import resource, sys
import torch
from trainer.processes import start_accelerator

if sys.argv[1] == "started":
    start_accelerator("no")


def work():
    parts = [torch.ones(5_000_000) for _ in range(10)]
    return sum(part[0].item() for part in parts)


for _ in range(10):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    """How often the kernel had to give memory that had been freed before, where by default it all goes back to it."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_not_asked_for_again():
    assert faults("plain") > 1000
    assert faults("started") < 100
