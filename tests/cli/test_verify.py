"""`--verify` passes where all is well. With one fault, only the check of this fault fails."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.harness.commands import on_ranks
from tests.harness.processes import ROOT
from trainer.verification import checks, verify
from trainer.verification.checks import Evidence, Row, fill_rows

NEEDS_GPU = {"masks, host and device", "fp16, overflow", "memory, a full GPU"}
NEEDS_BF16 = {"gradient, 16 bits"}
TIMED = "speed, packed"


def run_verify(folder, topology="cpu_multi", processes=2):
    """The finished process, and the rows by check. The files of the checks stay in the folder."""
    words = ("--topology", topology, "--processes", str(processes), "--folder", folder)
    command = [sys.executable, ROOT / "trainer/verification/verify.py", *words, "--output", folder / "verify.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert (folder / "verify.json").is_file(), ended.stderr
    return ended, {row["check"]: row for row in json.loads((folder / "verify.json").read_text())["checks"]}


def failed(rows):
    """The checks that failed, but for the one of time: other tests run beside it."""
    return [name for name, row in rows.items() if row["verdict"] == "FAILED" and name != TIMED]


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    return folder, *run_verify(folder)


def test_all_checks_pass_here(verified):
    _, ended, rows = verified
    assert failed(rows) == [], ended.stdout
    assert ended.returncode == (rows[TIMED]["verdict"] == "FAILED")
    assert {name for name, row in rows.items() if row["verdict"] == "skipped"} - NEEDS_GPU <= NEEDS_BF16
    for row in rows.values():
        assert row["figure"] and row["check"] in ended.stdout


class Forked(Evidence):
    """Its processes come from the fork server, with a fault: the start of real ones takes most of the time."""

    fault = None

    def command(self, num_processes, *program):
        return (self.fault, num_processes, program)


def run_forked(fault, num_processes, program, points=()):
    entry, words = ("verification/ranks", program[2:]) if program[0] == "-m" else ("run", program[1:])
    return on_ranks(num_processes, words, [(fault,), *points], entry=entry)


def read_output(command):
    if isinstance(command, list):  # of another program
        return real_read_output(command)
    ended = run_forked(*command)
    if any(rank.code for rank in ended):
        raise checks.Failed(ended[0].stderr)
    return ""


def kill_after_checkpoint(command, run):
    ended = run_forked(*command, [("at_call", "train_step", checks.KILL_STEP + 1)])
    assert [rank.code for rank in ended] == [-signal.SIGKILL] * len(ended)


real_read_output = checks.read_output
KEPT = {
    "weigh_micro_batches_alike": [],
    "key_masks_by_rank": ["one", "run_of_one"],
    "lose_the_head": ["one", "several"],
    "forget_the_optimizer": ["one", "several", "run_of_one", "run_of_group"],
}
"""by fault, what it cannot reach: taken from the pass without a fault, to save time"""
PLACES = {
    "one": ["ranks-1.json", "gradients-1.safetensors"],
    "several": ["ranks-2.json", "gradients-2.safetensors"],
    "run_of_one": ["tiny/one"],
    "run_of_group": ["tiny/group"],
}
"""by evidence, where it is kept in the folder"""


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("weigh_micro_batches_alike", "gradient, any micro-batches"),
        ("key_masks_by_rank", "gradient, 1 and N processes"),
        ("lose_the_head", "adapter, plain PEFT"),
        ("forget_the_optimizer", "run, killed and resumed"),
    ],
)
def test_a_fault_fails_its_check_alone(verified, tmp_path, monkeypatch, fault, check):
    monkeypatch.setattr(checks, "MEDIUM", checks.TINY)  # which only tells the speed, and takes long
    monkeypatch.setattr(checks, "read_output", read_output)
    monkeypatch.setattr(checks, "kill_after_checkpoint", kill_after_checkpoint)
    monkeypatch.setattr(Forked, "fault", fault)
    evidence = Forked(tmp_path, "cpu_multi", 2)
    assert evidence.options
    for name in KEPT[fault]:
        for place in PLACES[name]:
            copy = shutil.copytree if (verified[0] / place).is_dir() else shutil.copy
            copy(verified[0] / place, tmp_path / place)
        first = tmp_path / PLACES[name][0]
        evidence.__dict__[name] = first if first.is_dir() else json.loads(first.read_text())
    rows = {row.check: dataclasses.asdict(row) for row in fill_rows(evidence)}
    assert failed(rows) == [check]
    assert rows[check]["advice"]


def test_a_failed_check_is_told_and_fails_the_command(tmp_path, monkeypatch, capsys):
    rows = [Row("speed", "ok", "2 x", "1 x", ""), Row("memory", "FAILED", "none left", "", "buy more")]
    monkeypatch.setattr(checks, "fill_rows", lambda evidence: rows)
    output = tmp_path / "verify.json"
    words = ["verify.py", "--topology", "cpu_multi", "--processes", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    for name in ("ACCELERATE_USE_CPU", "HF_DATASETS_CACHE"):  # which it sets; restored for the tests behind this one
        monkeypatch.setenv(name, "")
    assert verify.main() == 1
    said = capsys.readouterr().out
    assert "FAILED   memory" in said and "buy more" in said and "1 ok, 1 FAILED, 0 skipped" in said
    assert [row["verdict"] for row in json.loads(output.read_text())["checks"]] == ["ok", "FAILED"]
