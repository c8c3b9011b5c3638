"""Killed at any moment and started again, a run ends with the very adapter of the uninterrupted one; so after a signal.

Every start is a new process. ISOTRAIN_FAULT_SEED draws other moments.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys

import pytest

from tests.harness.commands import changed, command, start
from tests.harness.data import OTHER_FAMILIES, save_backbone
from tests.harness.processes import ROOT
from tests.harness.runs import assert_same, checkpoints, outcome, records, tensors

SEED = int(os.environ.get("ISOTRAIN_FAULT_SEED", "20"))
LESS = ("no_figures",)
# A place that touches the disk or computes, and how often at least an uninterrupted run comes by it.
PLACES = [
    ("in_write", 42),
    ("example_losses", 26),
    ("pathlib:Path.rename", 7),
    ("shutil:rmtree", 16),
    ("_sync", 10),
    ("trainer.reporting.tracking:RunLog.log_scalars", 11),
]
ENDING = {
    "before the adapter": "save_adapter",
    "before the summary": "trainer.training.pipeline:summarize",
    "in the report": "trainer.reporting.page:build_report",
}


def random_moments():
    """A moment in each half of the run's processor time, and each place at a random visit."""
    chooser = random.Random(SEED)
    times = [("at_cpu_time", round((half + chooser.random()) / 2, 3)) for half in range(2)]
    visits = [(place, chooser.randint(1, count), chooser.random() < 0.5) for place, count in PLACES]
    places = [(p, visit) if p == "in_write" else ("at_call", p, visit, 9, after) for p, visit, after in visits]
    return times + places


def run_again(folder, arguments, reference):
    """The same command once more, to its end; then all must be as if nothing had been."""
    ended = command("run", arguments, [LESS])
    assert ended.code == 0, ended.stderr
    assert_same(folder, reference)
    return ended


@pytest.mark.parametrize("moment", random_moments(), ids=lambda moment: "-".join(map(str, moment)))
def test_killed_at_a_random_moment(moment, options, uninterrupted, reference, tmp_path):
    print(f"ISOTRAIN_FAULT_SEED={SEED}: {moment}")
    arguments = changed(options, run__output_dir=tmp_path)
    if moment[0] == "at_cpu_time":
        ended = command("run", arguments, [LESS, ("at_cpu_time", moment[1] * uninterrupted[1])])
        assert ended.code in (-signal.SIGPROF, 0), ended.stderr  # 0: this time it needed less
    else:
        ended = command("run", arguments, [LESS, moment])
        assert ended.code == -signal.SIGKILL, ended.stderr
        assert not (tmp_path / "run" / "summary.json").exists()
    run_again(tmp_path / "run", arguments, reference)


@pytest.mark.parametrize("place", [pytest.param(point, id=name) for name, point in ENDING.items()])
def test_killed_at_the_end(place, killed, reference):
    folder, arguments = killed
    assert command("run", arguments, [LESS, ("at_call", place)]).code == -signal.SIGKILL
    ended = run_again(folder, arguments, reference)
    assert "continuing after step 12" in ended.stderr


ADAPTERS = {
    "pissa": {"peft__init_lora_weights": "pissa"},
    "adalora": {
        "peft__peft_type": "ADALORA", "peft__r": None, "peft__init_r": 4, "peft__target_r": 2, "peft__tinit": 1,
        "peft__tfinal": 1, "peft__deltaT": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_killed_with_an_adapter_that_is_more_than_its_tensors(adapter, options, tmp_path):
    kill_and_compare(changed(options, **ADAPTERS[adapter], optim__lora_b_lr_ratio=4), tmp_path)


@pytest.mark.parametrize("family", ["modernbert", "qwen3"])
def test_killed_in_another_packed_family(family, options, tmp_path):
    targets, sizes = OTHER_FAMILIES[family]
    backbone = save_backbone(tmp_path / family, family, **sizes)
    options = changed(options, model__name=backbone, peft__target_modules=targets, model__packed="true")
    kill_and_compare(options, tmp_path)


def kill_and_compare(options, tmp_path):
    """A run of one epoch, killed in its fifth step and continued, is the run that nothing interrupted."""
    options = changed(options, optim__epochs=1)
    whole, killed = (changed(options, run__output_dir=tmp_path / name) for name in ("whole", "killed"))
    assert command("run", whole, [LESS]).code == 0
    assert command("run", killed, [LESS, ("at_call", "train_step", 5)]).code == -signal.SIGKILL
    ended = run_again(tmp_path / "killed" / "run", killed, outcome(tmp_path / "whole" / "run"))
    assert "continuing after step 3" in ended.stderr


# config.yaml is the first that a run writes
@pytest.mark.parametrize("point", [("at_call", "build_model"), ("torn_file", "config.yaml")], ids="-".join)
def test_killed_at_the_start(point, options, reference, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path)
    assert command("run", arguments, [LESS, point]).code == -signal.SIGKILL
    assert "continuing" not in run_again(tmp_path / "run", arguments, reference).stderr


@pytest.mark.parametrize("name", ["environment.json", ".unfinished-metrics.jsonl"])
def test_killed_while_it_writes_a_small_file(name, killed, reference):
    folder, arguments = killed
    assert command("run", arguments, [LESS, ("torn_file", name)]).code == -signal.SIGKILL
    run_again(folder, arguments, reference)


def test_killed_three_times(options, reference, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path)
    for point in [
        ("at_call", "example_losses", 10),  # step 5, between two micro-batches
        ("in_save", 2, 3),  # while it saves step 9
        ("at_call", "score_micro_batch", 2 + 5),  # in the evaluation of step 12
    ]:
        assert command("run", arguments, [LESS, point]).code == -signal.SIGKILL
    run_again(tmp_path / "run", arguments, reference)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["resumed_from"] == [3, 6, 9]


def test_continued_with_gradient_checkpointing(killed, reference):
    folder, arguments = killed
    run_again(folder, changed(arguments, model__gradient_checkpointing="true"), reference)


def test_another_seed_gives_another_outcome(options, reference, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path, run__seed=43)
    assert command("run", arguments, [LESS]).code == 0
    with pytest.raises(AssertionError, match="adapter differs"):
        assert_same(tmp_path / "run", reference)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "visit", "number"),
    [
        ("example_losses", 12, signal.SIGTERM),
        ("score_micro_batch", 1, signal.SIGINT),  # in a validation
        ("write_evaluation", 1, signal.SIGQUIT),  # in the test
    ],
)
def test_stopped_by_a_signal(place, visit, number, options, reference, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path)
    folder = tmp_path / "run"
    ended = command("run", arguments, [LESS, ("at_call", place, visit, int(number))])
    assert ended.code == 128 + number, ended.stderr
    assert "Traceback" not in ended.stderr
    message = re.search(
        rf"stopped by {signal.Signals(number).name}.* after step (\d+); the state is saved in (.*)\. The same command",
        ended.stderr,
    )
    assert message, ended.stderr
    assert checkpoints(folder)[-1].name == f"step-{int(message[1]):08d}"
    assert not (folder / "summary.json").exists()
    again = run_again(folder, arguments, reference)
    assert f"continuing after step {message[1]} of 12" in again.stderr


def test_stopped_before_the_training(options, reference, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path)
    ended = command("run", arguments, [LESS, ("at_call", "build_model", 1, int(signal.SIGINT))])
    assert ended.code == 128 + signal.SIGINT
    assert "Traceback" not in ended.stderr
    run_again(tmp_path / "run", arguments, reference)


def test_a_signal_while_the_outcome_is_written_changes_nothing(killed, reference):
    folder, arguments = killed
    ended = command("run", arguments, [LESS, ("at_call", "save_adapter", 1, int(signal.SIGTERM))])
    assert ended.code == 0, ended.stderr
    assert_same(folder, reference)


def test_stopped_after_an_evaluation_was_written_and_killed_before_it_was_saved(options, reference, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path)
    folder = tmp_path / "run"
    stop = ("at_call", "score_micro_batch", 1, int(signal.SIGTERM))
    assert command("run", arguments, [LESS, stop]).code == 128 + signal.SIGTERM
    assert checkpoints(folder)[-1].name == "step-00000004"  # not evaluated yet
    kill = ("at_call", "train_step", 1)
    assert command("run", arguments, [LESS, kill]).code == -signal.SIGKILL
    assert any("validation/loss" in line for line in records(folder))
    run_again(folder, arguments, reference)


# --- the real command line --------------------------------------------------------------------------------------------


def test_the_real_command_is_stopped_and_continued(options, reference, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path, optim__epochs=300, checkpoint__every_steps=1000)
    line = [sys.executable, str(ROOT / "trainer" / "run.py"), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    said = ""
    while "validation: accuracy" not in said:
        said += (one := process.stderr.readline())
        assert one, said
    process.send_signal(signal.SIGINT)
    said += process.stderr.read()
    assert process.wait(timeout=60) == 128 + signal.SIGINT, said
    assert "stopped by SIGINT (Ctrl-C) after step" in said
    assert "Traceback" not in said
    (saved,) = checkpoints(tmp_path / "run")
    assert tensors(saved / "adapter_model.safetensors").keys() == tensors(saved / "best_adapter.safetensors").keys()
    started = start("run", arguments, [LESS, ("at_call", "train_step", 2, int(signal.SIGTERM))])
    ended = started.wait()
    assert ended.code == 128 + signal.SIGTERM
    step = int(saved.name.removeprefix("step-"))
    assert f"continuing after step {step} of 1800" in ended.stderr
    assert f"after step {step + 2};" in ended.stderr
