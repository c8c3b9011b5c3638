"""What launchers and accelerate say in the environment: brought into one form, or refused, before data is read.

Always holds: one of several processes never trains alone unless the user asked for that, and no setting of accelerate
changes the training in silence. Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import urllib.parse

from trainer.errors import UserError

PR_SET_PDEATHSIG = 1  # Linux, sys/prctl.h
TRUE = {"1", "true", "yes", "y", "t", "on"}  # as accelerate reads them
GROUP = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPI = (  # the names of the same four in Open MPI, MVAPICH 2 and 3, jsrun, MPICH and Intel MPI, PALS
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")),
    tuple(f"MV2_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")),
    tuple(f"MVP_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")),
    tuple(f"JSM_NAMESPACE_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_SIZE", "PMI_RANK", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)
SIZES = (*(names[0] for names in MPI), "PET_NNODES", "FLUX_JOB_SIZE", "SKYPILOT_NUM_NODES", "DSTACK_NODES_NUM")
RANKS = ("PMI_RANK", "PMIX_RANK", "PALS_RANKID", "FLUX_TASK_RANK")
"""variables that tell of several processes, also from launchers that do not say how they meet"""
NO = {"", "no", "none", "0", "false", "f", "n", "off"}
ALLOWED = {
    "ACCELERATE_DYNAMO_BACKEND": NO,
    "ACCELERATE_USE_DEEPSPEED": NO,
    "ACCELERATE_USE_MEGATRON_LM": NO,
    "ACCELERATE_USE_PARALLELISM_CONFIG": NO,
    "ACCELERATE_USE_SAGEMAKER": NO,
    "ACCELERATE_USE_IPEX": NO,
    "ACCELERATE_USE_XPU": NO,
    "ACCELERATE_USE_TPU": NO,
    "ACCELERATE_DOWNCAST_BF16": NO,
    "ACCELERATE_TORCH_DEVICE": {""},
    "ACCELERATE_MIXED_PRECISION": {"", "no", "fp16", "bf16"},
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": {"", "1"},
    "PJRT_DEVICE": {"", "cpu", "cuda"},
}
ALLOWED_FSDP = {
    "FSDP_VERSION": {"2"},
    "FSDP_OFFLOAD_PARAMS": NO,
    "FSDP_CPU_RAM_EFFICIENT_LOADING": NO,
    "FSDP_ACTIVATION_CHECKPOINTING": NO,
}


def read_environment() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from the launcher's variables; a single process has none.

    Raises:
        UserError: the processes do not know how to meet, or accelerate has a setting that Isotrain does not support.
    """
    _end_with_launcher()
    _refuse_settings()
    _join_group()


def _end_with_launcher() -> None:
    """Has the kernel send SIGTERM to this process when launch.sh is killed: it saves and leaves.

    Raises:
        UserError: launch.sh is gone already.
    """
    launcher = os.environ.get("ISOTRAIN_LAUNCHER")
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if str(os.getppid()) != launcher:
            raise UserError(f"ISOTRAIN_LAUNCHER={launcher}: that launch.sh has ended; unset it to start without one")


def _refuse_settings() -> None:
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in TRUE
    for name, allowed in {**ALLOWED, **(ALLOWED_FSDP if sharded else {})}.items():
        value = os.environ.get(name, "")
        if value.lower() not in allowed:
            ours = "fsdp.yaml" if name in ALLOWED_FSDP else "*.yaml"
            raise UserError(
                f"{name}={value} is not supported. It comes from the environment or from accelerate's configuration: "
                f"unset it, or start with ./launch.sh or accelerate_configs/{ours}"
            )
    if sharded:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ.setdefault("USE_TORCH_XLA", "false")  # else accelerate takes torch_xla wherever it is installed


def _join_group() -> None:
    environment, source = os.environ, "WORLD_SIZE"
    alone = _number("ISOTRAIN_NUM_PROCESSES", 0) == 1
    if _number("WORLD_SIZE") > 1:
        if "LOCAL_RANK" not in environment:  # Kubernetes: a process is a pod
            if environment.get("PET_NNODES", environment["WORLD_SIZE"]) != environment["WORLD_SIZE"]:
                _refuse("PET_NNODES")
            environment.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        elif environment.get("GROUP_WORLD_SIZE") == "1" and "ISOTRAIN_NUM_PROCESSES" not in environment:
            _refuse_several()  # a torchrun of one machine in each of several tasks
    elif not alone:
        names = next((names for names in MPI if _number(names[0]) > 1 and names[2] in environment), None)
        if names is None:
            _refuse_several()
        else:
            source = names[0]
            pairs = zip(GROUP, names, strict=True)
            environment.update({ours: environment[theirs] for ours, theirs in pairs if theirs in environment})
    world_size = _number("WORLD_SIZE")
    if world_size <= 1:
        for name in (*GROUP, *(names[0] for names in MPI)):
            environment.pop(name, None)
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise UserError(
            f"{source}={world_size}, but {', '.join(missing)} is not set, so the processes cannot meet. Set it for all "
            "of them (mpirun -x NAME=VALUE), or start them with ./launch.sh or torchrun."
        )
    local_rank = environment.pop("LOCAL_RANK")  # until this is checked, every process speaks for itself
    for name, value, end in (
        ("RANK", environment["RANK"], world_size),
        ("LOCAL_RANK", local_rank, world_size),
        ("LOCAL_WORLD_SIZE", environment.get("LOCAL_WORLD_SIZE", "1"), world_size + 1),
        ("MASTER_PORT", environment["MASTER_PORT"], 65536),
    ):
        if not value.isdecimal() or int(value) >= end:
            raise UserError(f"{name}={value}: a number from 0 to {end - 1} (WORLD_SIZE is {world_size})")
    environment["LOCAL_RANK"] = local_rank


def _refuse_several() -> None:
    """Refuses processes of one launcher that do not know one another: each would train the whole run.

    Raises:
        UserError: there are several.
    """
    environment = os.environ
    if "SLURM_STEP_ID" in environment or _number("SLURM_PROCID", 0) > 0:
        for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
            if name in environment:
                if _number(name) > 1:
                    _refuse(name)
                return
    if "," in environment.get("SM_HOSTS", ""):
        _refuse("SM_HOSTS")
    for name in (*SIZES, *RANKS):
        if environment.get(name, "") not in ({"", "0", "1"} if name in SIZES else {"", "0"}):
            _refuse(name)


def _refuse(name: str) -> None:
    raise UserError(
        f"{name}={os.environ[name]}: this is one of several processes, and each would do all the work alone. "
        "For one run of all: ./launch.sh in each (docs/topologies.md). For a run in each: ISOTRAIN_NUM_PROCESSES=N, "
        "where N is the number of processes of each run."
    )


def _number(name: str, default: int = 1) -> int:
    value = os.environ.get(name) or str(default)
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name}={value} is not a number") from None


def set_environment() -> None:
    """Sets what libraries read from the environment when they are imported, where the user has not.

    oneDNN keeps each product that it has compiled, more than half a megabyte, for the next of the same shape; of the
    1,024 that are kept twice over by default, hardly one is met again but by the next layers of the same micro-batch.
    """
    chosen = {
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # of a lost process torch prints its own stack, at length
        "THP_MEM_ALLOC_ENABLE": "1",  # huge pages: a tenth faster on a CPU
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
        "TOKENIZERS_PARALLELISM": "false",  # the threads are ours: see tokenising.py
        "LRU_CACHE_CAPACITY": "16",  # of what torch keeps above oneDNN, which keeps it too
    }
    for name, value in chosen.items():
        os.environ.setdefault(name, value)
    _go_offline_without_hub()


def _go_offline_without_hub() -> None:
    """Where the hub does not answer, says so to its client, which would otherwise retry for a minute and more."""
    hub = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if proxied or os.environ.get("HF_HUB_OFFLINE"):
        return
    try:
        port = hub.port or (80 if hub.scheme == "http" else 443)
        socket.create_connection((hub.hostname or "", port), timeout=3).close()
    except (OSError, ValueError):  # no number, or none below 65536, for a port
        os.environ["HF_HUB_OFFLINE"] = "1"
