"""What --verify says about a machine. It reads files and asks drivers, and starts no training."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.commands.config import default_config_file

from trainer.compat import has_fast_bf16
from trainer.distributed.session import is_on_cpu
from trainer.launcher import find_missing_pin

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
GIB = 2**30
NEEDED_DISK, NEEDED_MEMORY, NEEDED_SHARED = GIB, 2 * GIB, 2**26
"""free bytes; the last for each process on several GPUs, in /dev/shm, where NCCL has its buffers"""


def read_facts() -> dict[str, Any]:
    """Facts about Python, libraries, devices and this machine's resources."""
    device = "cpu" if is_on_cpu() else torch.cuda.get_device_name()
    shared = Path("/dev/shm")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("accelerate", "transformers", "peft")},
        "device": device,
        "num_gpus": 0 if is_on_cpu() else torch.cuda.device_count(),
        "cuda": torch.version.cuda or torch.version.hip,
        "bf16": has_fast_bf16() if is_on_cpu() else torch.cuda.is_bf16_supported(including_emulation=False),
        "fp16": not is_on_cpu(),
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().available,
        "disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "shared_memory_bytes": shutil.disk_usage(shared).free if shared.is_dir() else None,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "accelerate_config": str(default_config_file) if Path(default_config_file).is_file() else None,
    }


def find_problems(facts: dict[str, Any], num_gpu_processes: int) -> list[str]:
    """What is wrong with a machine for a group of this many GPU processes, a line each."""
    # the user chose the versions of ISOTRAIN_PYTHON
    pin = find_missing_pin(REQUIREMENTS, any_version="ISOTRAIN_PYTHON" in os.environ)
    problems = [f"{pin} is pinned in requirements.txt, and missing or another version here"] if pin else []
    free = {
        "memory_bytes": ("memory", NEEDED_MEMORY),
        "disk_bytes": ("disk in this folder", NEEDED_DISK),
        "shared_memory_bytes": ("/dev/shm", NEEDED_SHARED * num_gpu_processes),
    }
    for name, (what, needed) in free.items():
        if facts[name] is not None and facts[name] < needed:
            problems.append(f"{what}: {facts[name] / GIB:.2f} GiB free, {needed / GIB:.2f} needed")
    return problems


def one_line_summary(facts: dict[str, Any]) -> str:
    """The facts on a line, to paste into an issue."""
    device = f"{facts['num_gpus']} x {facts['device']} (CUDA {facts['cuda']})" if facts["num_gpus"] else facts["cpu"]
    bf16 = "bf16" if facts["bf16"] else "no bf16"
    versions = " ".join(f"{name} {facts[name]}" for name in ("torch", "accelerate", "transformers", "peft"))
    memory = facts["memory_bytes"] / GIB
    return f"{device}, {bf16}, {facts['cores']} cores, {memory:.1f} GiB free, Python {facts['python']}, {versions}"


def _cpu_name() -> str:
    names = re.findall(r"model name\s*:\s*(.+)", _read(Path("/proc/cpuinfo")))
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: Path) -> str:
    return path.read_text() if os.access(path, os.R_OK) else ""
