"""How launch.sh reads the launchers around it, and what it does where others, GPUs, packages or bash are missing."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT
from trainer import launcher

OUTSIDE = "NNODES|NODE_RANK|MASTER_|OMP_|SLURM_|VIRTUAL_ENV|PET_|WORLD_SIZE|RANK|LOCAL_|ACCELERATE_"
MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
PODS = {**MASTER, "WORLD_SIZE": "2", "RANK": "1"}
TASKS = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1"}
TASKS |= {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_PROCID": "2", "SLURM_NODEID": "0", "SLURM_LOCALID": "2"}


def launch(*arguments, shell=None, **environment):
    outer = {name: value for name, value in os.environ.items() if not re.match(OUTSIDE, name)}
    return subprocess.run(
        [*([shell] if shell else []), ROOT / "launch.sh", *arguments],
        env=outer | {"ISOTRAIN_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "nodes", "rank", "total"),
    [
        ([], PODS, "2 (the pods' WORLD_SIZE)", "1 (RANK)", 2),
        (["--processes=2"], PODS, "2 (the pods' WORLD_SIZE)", "1 (RANK)", 4),
        ([], PODS | {"WORLD_SIZE": "4", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "2"}, "2 (PET_NNODES)", "1 (RANK)", 4),
        (
            [],
            {"PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "auto", "PET_MASTER_ADDR": "10.0.0.1",
             "PET_MASTER_PORT": "29500"},
            "3 (PET_NNODES)", "2 (PET_NODE_RANK)", 3,
        ),
        ([], PODS | {"NNODES": "3", "NODE_RANK": "0"}, "3 (NNODES)", "0 (NODE_RANK)", 3),
        ([], TASKS | {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2", "PMI_SIZE": "4"}, "4 (tasks of srun)",
         "2 (SLURM_PROCID)", 4),
        (["--topology=cpu"], TASKS, None, None, 1),
        ([], {"WORLD_SIZE": "1", "RANK": "0", "PET_NNODES": "1"}, None, None, 1),
        ([], {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2"}, None, None, 2),
    ],
)  # fmt: skip
def test_the_group_is_that_of_the_launcher_around_it(arguments, environment, nodes, rank, total):
    result = launch("--dry-run", *arguments, **environment)
    plan = {name: f"{value} ({source})" for name, value, source in re.findall(r"(\w+) +(\S+) +\((.*)\)", result.stderr)}
    assert (plan.get("nodes"), plan.get("node_rank")) == (nodes, rank), result.stderr
    words = shlex.split(result.stdout)
    assert f"ISOTRAIN_NUM_PROCESSES={total}" in words
    assert {"ISOTRAIN_DEVICE=cpu", "ISOTRAIN_PRECISION=auto", "ACCELERATE_USE_CPU=true"} <= set(words)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--topology=cpu_multi"], PODS, "--topology cpu_multi is for one machine, and the pods' WORLD_SIZE=2"),
        (
            ["--topology=cpu"],
            {**MASTER, "NNODES": "2", "NODE_RANK": "0"},
            "--topology cpu is for one machine, and NNODES=2",
        ),
        (["--topology=cpu_multi"], TASKS, "--topology cpu_multi is for one machine, and srun has several tasks"),
        ([], PODS | {"RANK": ""}, "multi_node needs NODE_RANK"),
        ([], PODS | {"LOCAL_RANK": "0"}, "WORLD_SIZE=2 and LOCAL_RANK=0: another launcher started this"),
        ([], PODS | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two: 1 or more"),
        ([], MASTER | {"NNODES": "two"}, "NNODES=two: 1 or more"),
        ([], MASTER | {"NNODES": "10", "NODE_RANK": "08"}, "NODE_RANK=08: 0 to 9"),
        ([], PODS | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999: 1 to 65535"),
        ([], {"PET_NNODES": "1:3", "PET_RDZV_BACKEND": "c10d"}, "PET_NNODES=1:3: a fixed number of pods"),
        ([], {"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: this is one of several processes"),
        (["--topology=cpu"], {"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, "MPI_LOCALNRANKS=2: this is one of several"),
        ([], {"SM_HOSTS": '["algo-1","algo-2"]'}, "SM_HOSTS="),
        ([], {"ISOTRAIN_PYTHON": "/nowhere/python"}, "ISOTRAIN_PYTHON=/nowhere/python lacks Python 3.11 or later"),
    ],
)
def test_what_would_train_alone_or_not_at_all_is_refused(arguments, environment, message):
    result = launch("--dry-run", *arguments, **environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"launch.sh: {message}") and result.stderr.count("\n") == 1


def test_a_missing_package_of_the_interpreter_is_named(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    result = launch("--dry-run", ISOTRAIN_PYTHON=str(bare))
    assert result.returncode == 2
    assert re.fullmatch(r"launch\.sh: ISOTRAIN_PYTHON=\S+ lacks torch==\S+; install .*\n", result.stderr)


def test_the_plan_of_gpus_goes_to_run_py(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0: A100\necho GPU 1: A100\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1"}
    words = shlex.split(launch("--dry-run", "--run.precision=bf16", **path).stdout)
    assert {"ISOTRAIN_DEVICE=cuda", "ISOTRAIN_PRECISION=bf16", "ACCELERATE_USE_CPU=false"} <= set(words)
    assert "no GPU visible" in launch("--dry-run", **path, ACCELERATE_USE_CPU="true").stderr
    sweep = launch(
        "--dry-run", "--topology=gpu", **path, **TASKS | {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1"}
    )
    assert "CUDA_VISIBLE_DEVICES=1" in shlex.split(sweep.stdout), sweep.stderr


def test_another_shell_says_that_it_is_none():
    with (ROOT / "launch.sh").open() as script:
        piped = subprocess.run(["bash", "-s", "--", "--dry-run"], stdin=script, capture_output=True, text=True)
    for result in (launch("--dry-run", shell="dash"), piped):
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert "bash launch.sh" in result.stderr


def test_bash_may_be_called_sh(tmp_path):
    (tmp_path / "sh").symlink_to(shutil.which("bash"))
    result = launch("--dry-run", shell=tmp_path / "sh")
    assert (result.returncode, result.stdout.count("ISOTRAIN_DEVICE=cpu")) == (0, 1), result.stderr


def test_a_busy_port_names_master_port_and_asks_for_no_retry():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = launch("--recipe=x", NNODES="2", NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"launch.sh: 127.0.0.1:{port}: the port is in use") and "another MASTER_PORT" in line


@pytest.mark.parametrize(
    ("answers", "whom"), [(False, "node 0 at MASTER_ADDR:MASTER_PORT"), (True, "the others of 3 nodes")]
)
def test_the_launcher_says_whom_it_waits_for_and_gives_up(monkeypatch, capsys, answers, whom):
    class GaveUp(Exception):
        pass

    def leave(code):
        assert code == os.EX_TEMPFAIL
        raise GaveUp

    monkeypatch.setattr(launcher, "TELL_SECONDS", 0.2)
    monkeypatch.setattr(launcher, "GATHERING_SECONDS", 0.5)
    monkeypatch.setattr(launcher.psutil.Process, "children", lambda self: [])
    monkeypatch.setattr(os, "_exit", leave)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not answers:
            server.close()
        with pytest.raises(GaveUp):
            launcher._tell_who_is_missing(3, 1, "127.0.0.1", port)
    waiting, *_, last = capsys.readouterr().err.splitlines()
    assert waiting.startswith(f"launch.sh: node 1 waits for {whom}") and f"127.0.0.1:{port}" in waiting
    assert last.startswith("launch.sh: node 1 gives up after 0.5 s") and f"127.0.0.1:{port}" in last


def test_options_of_torchrun_from_the_environment_do_not_reach_it(monkeypatch):
    given = {"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "WORLD_SIZE": "2", "RANK": "1", "HOME": "/root"}
    monkeypatch.setattr(os, "environ", dict(given))
    launcher._clear_environment()
    assert os.environ == {
        "HOME": "/root", "PET_SIGNALS_TO_HANDLE": "SIGURG", "ISOTRAIN_LAUNCHER": str(os.getpid())
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="the death of a parent is told by Linux alone")
def test_a_rank_ends_with_its_launcher():
    rank = (
        "from trainer.distributed.environment import read_environment\nimport time\nread_environment()\n"
        "print('here', flush=True)\ntime.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys\nos.environ['ISOTRAIN_LAUNCHER'] = str(os.getpid())\n"
        f"child = subprocess.Popen([sys.executable, '-c', {rank!r}])\nprint(child.pid, flush=True)\nchild.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        orphan = psutil.Process(int(process.stdout.readline()))
        assert process.stdout.readline() == "here\n"
        process.kill()
        deadline = time.monotonic() + 30
        while orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, orphan.kill()
            time.sleep(0.05)


def test_shell_scripts_keep_their_line_ends():
    scripts = ["launch.sh", "tests/run.sh", ".ci/run", "examples/slurm/train.sbatch"]
    found = subprocess.run(["git", "check-attr", "eol", *scripts], cwd=ROOT, capture_output=True, text=True).stdout
    assert found.count("eol: lf") == len(scripts)
