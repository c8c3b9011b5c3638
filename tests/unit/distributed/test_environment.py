"""What launchers and accelerate leave in the environment: understood, or refused in one line."""

import os
import socket

import pytest

from trainer.distributed.environment import read_environment, set_environment
from trainer.errors import UserError, is_first_on_machine, main_guard

MASTER = {"MASTER_ADDR": "host-0", "MASTER_PORT": "29500"}
SECOND_OF_TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN = MASTER | SECOND_OF_TWO
OF_SRUN = TORCHRUN | {"GROUP_WORLD_SIZE": "1", "SLURM_STEP_ID": "1"}
OF_A_POD = SECOND_OF_TWO | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
ALONE = dict.fromkeys(SECOND_OF_TWO)


def said(monkeypatch, variables):
    """The group that a process with these variables finds itself in."""
    monkeypatch.setattr(os, "environ", dict(variables))
    read_environment()
    return {name: os.environ.get(name) for name in SECOND_OF_TWO}


def mpi(*names):
    return dict(zip(names, ("2", "1", "1", "2"), strict=True))


@pytest.mark.parametrize(
    ("variables", "group"),
    [
        ({}, ALONE),
        (TORCHRUN, SECOND_OF_TWO),  # torchrun, accelerate, Ray
        ({**TORCHRUN, "OMPI_COMM_WORLD_SIZE": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, SECOND_OF_TWO),
        ({**MASTER, "WORLD_SIZE": "2", "RANK": "1"}, OF_A_POD),
        ({**MASTER, "WORLD_SIZE": "2", "RANK": "1", "PET_NNODES": "2"}, OF_A_POD),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, ALONE),
        ({"LOCAL_RANK": "2"}, ALONE),
        ({"WORLD_SIZE": "", "LOCAL_RANK": "2", "SLURM_LOCALID": "2"}, ALONE),
        (MASTER | mpi(*(f"OMPI_COMM_WORLD_{n}" for n in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))), SECOND_OF_TWO),
        (MASTER | mpi(*(f"MV2_COMM_WORLD_{n}" for n in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE"))), SECOND_OF_TWO),
        (MASTER | mpi("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"), SECOND_OF_TWO),
        (MASTER | mpi("PMI_SIZE", "PMI_RANK", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"), SECOND_OF_TWO),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, ALONE),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, ALONE),  # the job script itself
        ({"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, ALONE),
        ({"SLURM_STEP_ID": "1", "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "3", "SLURM_LOCALID": "0"}, ALONE),
        ({"SLURM_STEP_ID": "1", "SLURM_NTASKS": "4", "ISOTRAIN_NUM_PROCESSES": "1", "PMI_SIZE": "4"}, ALONE),
        ({"SM_HOSTS": '["algo-1"]'}, ALONE),
        ({"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0", "PMI_SIZE": "1"}, ALONE),
        ({**OF_SRUN, "SLURM_STEP_NUM_TASKS": "1"}, SECOND_OF_TWO),
        ({**OF_SRUN, "SLURM_STEP_NUM_TASKS": "2", "ISOTRAIN_NUM_PROCESSES": "2"}, SECOND_OF_TWO),
    ],
)
def test_every_launcher_is_supported(monkeypatch, variables, group):
    assert said(monkeypatch, variables) == group
    assert "PMI_SIZE" not in os.environ or group is not ALONE  # accelerate would form a group by itself


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, "SLURM_NTASKS=4: this is one of several processes"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, "PET_NNODES=2: this is one of several"),
        ({"PET_NNODES": "1:3"}, "PET_NNODES=1:3: this is one of several"),
        ({**MASTER, "WORLD_SIZE": "4", "RANK": "1", "PET_NNODES": "2"}, "PET_NNODES=2: this is one of several"),
        ({"SM_HOSTS": '["algo-1","algo-2"]'}, "SM_HOSTS=.*: this is one of several"),
        ({"PMI_RANK": "1"}, "PMI_RANK=1: this is one of several"),
        ({"PALS_RANKID": "1"}, "PALS_RANKID=1: this is one of several"),
        ({**OF_SRUN, "SLURM_STEP_NUM_TASKS": "3"}, "SLURM_STEP_NUM_TASKS=3: this is one of several"),
        (
            {**TORCHRUN, "GROUP_WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "3"},
            "OMPI_COMM_WORLD_SIZE=3: this is one of several",
        ),
        ({"PMI_SIZE": "3"}, "PMI_SIZE=3: this is one of several"),
        ({"SKYPILOT_NUM_NODES": "2"}, "SKYPILOT_NUM_NODES=2: this is one of several"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            "OMPI_COMM_WORLD_SIZE=2, but MASTER_ADDR, MASTER_PORT is not set",
        ),
        ({**MASTER, "WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2, but MASTER_ADDR, MASTER_PORT is not set"),
        ({**MASTER, "WORLD_SIZE": "2", "RANK": "2"}, r"RANK=2 must be a number from 0 to 1 \(WORLD_SIZE is 2\)"),
        ({**MASTER, "WORLD_SIZE": "2", "RANK": "one"}, "RANK=one must be a number from 0 to 1"),
        ({**TORCHRUN, "LOCAL_RANK": "x"}, "LOCAL_RANK=x must be a number from 0 to 1"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT=99999 must be a number from 0 to 65535"),
        ({"ISOTRAIN_LAUNCHER": "1"}, "ISOTRAIN_LAUNCHER=1: that launch.sh has ended"),
        ({"ISOTRAIN_NUM_PROCESSES": "N"}, "ISOTRAIN_NUM_PROCESSES=N is not a number"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR is not supported.*unset it"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true is not supported"),
        ({"ACCELERATE_USE_SAGEMAKER": "true"}, "ACCELERATE_USE_SAGEMAKER=true is not supported"),
        ({"ACCELERATE_DOWNCAST_BF16": "yes"}, "ACCELERATE_DOWNCAST_BF16=yes is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION=fp8 is not supported"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 is not supported"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:1"}, "ACCELERATE_TORCH_DEVICE=cuda:1 is not supported"),
        ({"PJRT_DEVICE": "TPU"}, "PJRT_DEVICE=TPU is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP_VERSION= is not supported.*launch.sh"),
        ({"ACCELERATE_USE_FSDP": "True", "FSDP_VERSION": "1"}, "FSDP_VERSION=1 is not supported.*launch.sh"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "FSDP_OFFLOAD_PARAMS=true is not supported",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "FSDP_CPU_RAM_EFFICIENT_LOADING=true is not supported",
        ),
    ],
)
def test_unsupported_settings_are_refused_in_one_line(monkeypatch, variables, message):
    with pytest.raises(UserError, match=message) as refusal:
        said(monkeypatch, variables)
    assert "\n" not in str(refusal.value)
    assert "RANK=" not in str(refusal.value) or is_first_on_machine()  # nobody else has this mistake


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "false"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_USE_CPU": "True"},
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"},
        {"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"},
    ],
)
def test_defaults_of_accelerate_are_accepted(monkeypatch, variables):
    said(monkeypatch, variables)


@pytest.mark.parametrize(
    ("variables", "speaks"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, True),
        ({"SLURM_LOCALID": "2"}, True),
        ({"LOCAL_RANK": "3", "WORLD_SIZE": "1"}, True),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, False),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, True),
    ],
)
def test_an_error_is_printed_once_per_machine(monkeypatch, capsys, variables, speaks):
    monkeypatch.setattr(os, "environ", dict(variables))
    assert is_first_on_machine() == speaks

    def mistake():
        raise UserError("no such file")

    assert main_guard(mistake) == 2
    assert capsys.readouterr().err == ("error: no such file\n" if speaks else "")


@pytest.mark.parametrize(("path", "offline"), [("", False), ("/elsewhere", False), (None, True)])
def test_an_unreachable_hub_sets_offline_mode(monkeypatch, path, offline):
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if path is not None:
            server.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}{path or ''}")
        monkeypatch.setattr(os, "environ", dict(os.environ))
        set_environment()
        assert ("HF_HUB_OFFLINE" in os.environ) == offline
