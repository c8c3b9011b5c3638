"""examples/slurm/train.sbatch under a Slurm of this machine: what becomes of a job that was stopped, lost or failed."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.harness.processes import ROOT

MISSING = [name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name, path="/usr/sbin:/usr/bin")]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {' '.join(MISSING)} (apt-get install slurm-wlm munge)"),
    pytest.mark.skipif(os.getuid() != 0, reason="slurmd starts its tasks as root only"),
]
SCRIPT = ROOT / "examples/slurm/train.sbatch"
TWO_TASKS = "--nodes=1 --ntasks=2 --ntasks-per-node=2 --cpus-per-task=1 --time=5".split(" ")


class Slurm:
    """Slurm's commands, and the jobs of train.sbatch."""

    def __init__(self, conf, log):
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMP_"))},
            "SLURM_CONF": conf, "ISOTRAIN_PYTHON": sys.executable, "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.log = log

    def __call__(self, *command, cwd=ROOT):
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *arguments, cwd=ROOT):
        self.log.unlink(missing_ok=True)
        return self("sbatch", "--parsable", *TWO_TASKS, f"--output={self.log}", SCRIPT, *arguments, cwd=cwd)

    def state(self, job):
        return self("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}")

    def said(self):
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    start = subprocess.Popen(
        [ROOT / "tests/slurm/start.sh", folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    name, _, conf = start.stdout.readline().strip().partition("=")
    assert name == "SLURM_CONF", "start.sh failed"
    yield Slurm(conf, folder / "job.log")
    start.communicate(timeout=60)


def wait_until(true, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"no {what} in {seconds} s"
        time.sleep(0.2)


def test_a_job_goes_on_where_it_was_stopped(slurm, tiny_arguments, tmp_path):
    run = tmp_path / "runs/tiny"
    job = slurm.submit(*tiny_arguments, "--optim.max_steps", "60", "--optim.epochs", "20")
    wait_until(lambda: list(run.glob("checkpoints/step-*")), "checkpoint")
    slurm("scancel", "--signal=TERM", job)
    wait_until(lambda: slurm.state(job) == "COMPLETED", "end")

    (stopped,) = re.findall(r"stopped by SIGTERM after step (\d+); the state is saved", slurm.said())
    assert "train.sbatch: exit code 143; queued again" in slurm.said()
    assert slurm.said().count("topology    multi_node") == 2  # once a life
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumed_from"] == [int(stopped)]
    assert summary["world_sizes"] == [2, 2]


@pytest.fixture
def stand_in(tmp_path):
    """A folder where launch.sh is a few lines of shell."""

    def stand_in(lines):
        (tmp_path / "launch.sh").write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / "launch.sh").chmod(0o755)
        return tmp_path

    return stand_in


def test_a_lost_process_queues_the_job_again(slurm, stand_in):
    lines = "if ((SLURM_RESTART_COUNT)); then exit 0; elif ((SLURM_PROCID)); then kill -9 $$; else sleep 1; exit 75; fi"
    job = slurm.submit(cwd=stand_in(lines))
    wait_until(lambda: slurm.state(job) == "COMPLETED", "end")
    assert "train.sbatch: exit code 137; queued again" in slurm.said()


@pytest.mark.parametrize("code", [1, 2])
def test_a_failed_job_is_over(slurm, stand_in, code):
    job = slurm.submit(cwd=stand_in(f"sleep $SLURM_PROCID; exit {code}"))
    wait_until(lambda: slurm.state(job) == "FAILED", "failure")
    assert f"ExitCode={code}:0" in slurm("scontrol", "show", "job", job)


def test_a_cancelled_job_stays_cancelled(slurm, stand_in):
    job = slurm.submit(cwd=stand_in("trap 'sleep 1; exit 143' TERM; echo ready; while :; do sleep 0.1; done"))
    wait_until(lambda: slurm.said().count("ready") == 2, "start")
    slurm("scancel", job)
    wait_until(lambda: not slurm("squeue", "--noheader", f"--jobs={job}"), "end")
    assert slurm.state(job) == "CANCELLED"


def test_another_folder_is_a_mistake(slurm, tmp_path):
    job = slurm.submit(cwd=tmp_path)
    wait_until(lambda: slurm.state(job) == "FAILED", "failure")
    assert slurm.said() == f"train.sbatch: no launch.sh in {tmp_path}; type sbatch in the repository's folder\n"
