"""How launch.sh reads the launchers around it, and what it does where others, GPUs, packages or bash are missing."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tests.harness.processes import ROOT

OUTSIDE = "NNODES|NODE_RANK|MASTER_|OMP_|SLURM_|VIRTUAL_ENV|PET_|WORLD_SIZE|RANK|LOCAL_|ACCELERATE_"


def launch(*arguments, shell=None, **environment):
    outer = {name: value for name, value in os.environ.items() if not re.match(OUTSIDE, name)}
    return subprocess.run(
        [*([shell] if shell else []), ROOT / "launch.sh", *arguments],
        env=outer | {"ISOTRAIN_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_an_interpreter_that_cannot_start_is_named():
    result = launch("--dry-run", ISOTRAIN_PYTHON="/nowhere/python")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("launch.sh: ISOTRAIN_PYTHON=/nowhere/python lacks Python 3.11 or later")


def test_a_missing_package_of_the_interpreter_is_named(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    result = launch("--dry-run", ISOTRAIN_PYTHON=str(bare))
    assert result.returncode == 2
    assert re.fullmatch(r"launch\.sh: ISOTRAIN_PYTHON=\S+ lacks torch==\S+; install .*\n", result.stderr)


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


def test_a_busy_port_names_master_port_and_asks_for_no_retry(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        node = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        result = launch("--run.output_dir", str(tmp_path), "--processes=1", **node)
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert f"127.0.0.1:{port}" in line and "another MASTER_PORT" in line


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
