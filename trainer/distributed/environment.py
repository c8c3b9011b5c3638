"""The environment variables of launchers, accelerate and libraries.

One of several processes never trains alone by accident, and no setting of accelerate changes training silently.
Imports no torch.
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
TRUE_WORDS = {"1", "true", "yes", "y", "t", "on"}  # as in accelerate
FALSE_WORDS = {"", "no", "none", "0", "false", "f", "n", "off"}
GROUP_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPI_VARIABLES = (  # the same four: Open MPI, MVAPICH 2 and 3, jsrun, MPICH and Intel MPI, PALS
    *(
        tuple(f"{prefix}_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))
        for prefix in ("OMPI_COMM_WORLD", "MV2_COMM_WORLD", "MVP_COMM_WORLD", "JSM_NAMESPACE")
    ),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_SIZE", "PMI_RANK", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)
# A size above 1 or a rank above 0 shows that there are several processes, even if the launcher does not connect them.
SIZE_VARIABLES = (
    *(names[0] for names in MPI_VARIABLES), "PET_NNODES", "FLUX_JOB_SIZE", "SKYPILOT_NUM_NODES", "DSTACK_NODES_NUM",
)  # fmt: skip
RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "PALS_RANKID", "FLUX_TASK_RANK")
MUST_BE_OFF = (
    *(f"ACCELERATE_USE_{plugin}" for plugin in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")),
    *("ACCELERATE_USE_IPEX", "ACCELERATE_USE_XPU", "ACCELERATE_USE_TPU", "ACCELERATE_DOWNCAST_BF16"),
    *("ACCELERATE_DYNAMO_BACKEND", "FSDP_OFFLOAD_PARAMS", "FSDP_CPU_RAM_EFFICIENT_LOADING"),
    "FSDP_ACTIVATION_CHECKPOINTING",
)
SUPPORTED_VALUES = {
    **dict.fromkeys(MUST_BE_OFF, FALSE_WORDS),
    "ACCELERATE_TORCH_DEVICE": {""},
    "ACCELERATE_MIXED_PRECISION": {"", "no", "fp16", "bf16"},
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": {"", "1"},
    "PJRT_DEVICE": {"", "cpu", "cuda"},
}


def read_environment() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from the launcher's variables; unsets them if alone."""
    _end_with_launcher()
    _check_accelerate_settings()
    _set_group()


def _end_with_launcher() -> None:
    """Makes the kernel send SIGTERM if launch.sh is killed, so that the run saves and exits."""
    launcher = os.environ.get("ISOTRAIN_LAUNCHER")
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if str(os.getppid()) != launcher:
            raise UserError(f"ISOTRAIN_LAUNCHER={launcher}: that launch.sh has ended; unset it to start without one")


def _check_accelerate_settings() -> None:
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in TRUE_WORDS
    for name, supported in {**SUPPORTED_VALUES, **({"FSDP_VERSION": {"2"}} if is_sharded else {})}.items():
        value = os.environ.get(name, "")
        if value.lower() not in supported:
            raise UserError(
                f"{name}={value} is not supported. It comes from the environment or from accelerate's configuration: "
                "unset it, or start with ./launch.sh"
            )
    if is_sharded:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ.setdefault("USE_TORCH_XLA", "false")  # accelerate would use torch_xla if it is installed


def _set_group() -> None:
    environment, source = os.environ, "WORLD_SIZE"
    if read_number("WORLD_SIZE") > 1:
        if "LOCAL_RANK" not in environment:  # Kubernetes: one process per pod
            if environment.get("PET_NNODES", environment["WORLD_SIZE"]) != environment["WORLD_SIZE"]:
                _refuse_process(by="PET_NNODES")
            environment.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        elif environment.get("GROUP_WORLD_SIZE") == "1" and "ISOTRAIN_NUM_PROCESSES" not in environment:
            _refuse_unconnected_processes()  # several tasks, each with a torchrun of one machine
    elif read_number("ISOTRAIN_NUM_PROCESSES", 0) != 1:
        for names in MPI_VARIABLES:
            if read_number(names[0]) > 1 and names[2] in environment:
                source, pairs = names[0], zip(GROUP_VARIABLES, names, strict=True)
                environment.update({ours: environment[theirs] for ours, theirs in pairs if theirs in environment})
                break
        else:
            _refuse_unconnected_processes()
    if read_number("WORLD_SIZE") > 1:
        _check_group(source)
    else:
        for name in (*GROUP_VARIABLES, *(names[0] for names in MPI_VARIABLES)):
            environment.pop(name, None)


def _check_group(source: str) -> None:
    environment, world_size = os.environ, int(os.environ["WORLD_SIZE"])
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise UserError(
            f"{source}={world_size}, but {', '.join(missing)} is not set, so the processes cannot find each other. Set "
            "it for all of them (mpirun -x NAME=VALUE), or start them with ./launch.sh or torchrun."
        )
    local_rank = environment.pop("LOCAL_RANK")  # while it is unset, every process prints its errors
    numbers = {name: environment.get(name, "1") for name in ("RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")}
    ends = {"LOCAL_WORLD_SIZE": world_size + 1, "MASTER_PORT": 65536}
    for name, value in {**numbers, "LOCAL_RANK": local_rank}.items():
        end = ends.get(name, world_size)
        if not value.isdecimal() or int(value) >= end:
            raise UserError(f"{name}={value} must be a number from 0 to {end - 1} (WORLD_SIZE is {world_size})")
    environment["LOCAL_RANK"] = local_rank


def _refuse_unconnected_processes() -> None:
    """Refuses several processes that do not know of each other, because each would train the whole run."""
    environment = os.environ
    if "SLURM_STEP_ID" in environment or read_number("SLURM_PROCID", 0) > 0:
        name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        if read_number(name) > 1:
            _refuse_process(by=name)
        if name in environment:
            return
    if "," in environment.get("SM_HOSTS", ""):
        _refuse_process(by="SM_HOSTS")
    for name in (*SIZE_VARIABLES, *RANK_VARIABLES):
        if environment.get(name, "") not in ({"", "0", "1"} if name in SIZE_VARIABLES else {"", "0"}):
            _refuse_process(by=name)


def _refuse_process(by: str) -> None:
    raise UserError(
        f"{by}={os.environ[by]}: this is one of several processes, and each would train alone. To train together, "
        "start ./launch.sh in each (docs/topologies.md). To train separately, set ISOTRAIN_NUM_PROCESSES to the "
        "number of processes per run."
    )


def read_number(name: str, default: int = 1) -> int:
    """The number in an environment variable, or the default if it is unset or empty."""
    value = os.environ.get(name) or str(default)
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name}={value} is not a number") from None


def set_environment() -> None:
    """Sets what libraries read from the environment on import, unless the user has set it."""
    settings = {
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # when a process is lost, torch prints long stack traces
        "THP_MEM_ALLOC_ENABLE": "1",  # huge pages: 10 % faster on a CPU
        # oneDNN caches a compiled product per shape, 0.5 MB each; only the layers of one micro-batch use it again
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
        "LRU_CACHE_CAPACITY": "16",  # torch's own cache on top of oneDNN's
        "TOKENIZERS_PARALLELISM": "false",  # data/tokens.py starts its own threads
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    # an import then fails: with this package, YOSO and bitsandbytes 0.50 would run code from the hub
    sys.modules["kernels"] = None  # type: ignore[assignment]
    _go_offline_without_hub()


def _go_offline_without_hub() -> None:
    """Sets HF_HUB_OFFLINE if the hub does not answer, because its client would retry for minutes."""
    hub = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    has_proxy = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if has_proxy or os.environ.get("HF_HUB_OFFLINE"):
        return
    try:
        port = hub.port or (80 if hub.scheme == "http" else 443)
        socket.create_connection((hub.hostname or "", port), timeout=3).close()
    except (OSError, ValueError):  # ValueError: the port is not valid
        os.environ["HF_HUB_OFFLINE"] = "1"
