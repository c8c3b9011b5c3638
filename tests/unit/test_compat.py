"""Memory that is freed stays at hand, and what nobody asks for again is freed."""

import os
import subprocess
import sys

import pytest

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


PRODUCTS = """
import ctypes, sys
from trainer.distributed.environment import set_environment
import trainer.compat

if sys.argv[1] == "set":
    set_environment()
import torch


class Counts(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]


library = ctypes.CDLL(None)
library.mallinfo2.restype = Counts
weight = torch.ones(64, 64, dtype=torch.bfloat16)
before = library.mallinfo2().field7
for rows in range(1, 401):
    torch.ones(rows, 64, dtype=torch.bfloat16) @ weight
print(library.mallinfo2().field7 - before)
"""


def test_hardly_a_compiled_product_is_kept():
    """The bytes in use after products of 400 shapes."""

    def kept(argument):
        names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        command = [sys.executable, "-c", PRODUCTS, argument]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    by_default = kept("unset")
    if by_default < 5e7:
        pytest.skip("oneDNN does not compile products in bf16 for this processor")
    assert kept("set") < by_default / 2


def test_the_environment_a_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", environment := {"LRU_CACHE_CAPACITY": "7"})
    set_environment()
    assert environment["LRU_CACHE_CAPACITY"] == "7" and environment["THP_MEM_ALLOC_ENABLE"] == "1"
