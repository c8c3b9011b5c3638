"""Memory that is freed stays at hand, and what nobody asks for again is freed."""

import os
import subprocess
import sys

from trainer.distributed.environment import set_environment

SCRIPT = """
import resource
import torch
from trainer.distributed.session import start_accelerator


def work():
    parts = [torch.ones(5_000_000) for _ in range(10)]
    return sum(part[0].item() for part in parts)


def faults():
    for _ in range(10):
        work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


before = faults()
start_accelerator("no")
print(before, faults())
"""


def test_freed_memory_is_not_asked_for_again():
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # by default it may go back or not
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 1000
    assert after < 100


def test_the_environment_a_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", environment := {"LRU_CACHE_CAPACITY": "7"})
    set_environment()
    assert environment["LRU_CACHE_CAPACITY"] == "7" and environment["THP_MEM_ALLOC_ENABLE"] == "1"
