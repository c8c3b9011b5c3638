"""How a run begins, goes on and ends in a world that is not its own: folders, machines, readers."""

import fcntl
import json
import re
import shlex
import signal

import numpy as np
import pytest

from tests.harness.commands import changed, command
from tests.harness.data import topic_rows, write_csv
from tests.harness.runs import assert_same, outcome, tensors

LESS = ("no_figures",)
UNREAD = ("at_call", "load_corpus")  # killed if it reads any data


def error_of(ended):
    assert ended.code == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_tracker_that_is_not_there_is_found_before_any_data_is_read(options, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path, tracking__backends="[tensorboard, no-such-tracker]")
    assert "tracking.backends: 'no-such-tracker' is not installed; installed: tensorboard" in error_of(
        command("run", arguments, [UNREAD])
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["in a file", "in use", "another configuration"])
def test_what_is_wrong_with_the_folder_is_found_before_any_data_is_read(place, killed, tmp_path):
    folder, arguments = killed
    if place == "in a file":
        (tmp_path / "file").touch()
        output = tmp_path / "file" / "runs"
        ended = command("run", changed(arguments, run__output_dir=output), [UNREAD])
        assert str(output) in error_of(ended)
    elif place == "in use":
        with open(folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert "is in use by another running command" in error_of(command("run", arguments, [UNREAD]))
    else:
        ended = command("run", changed(arguments, optim__epochs=5), [UNREAD])
        assert "another configuration: optim.epochs (there 2, now 5)" in error_of(ended)


def test_precision_is_chosen_once(killed, reference):
    """The run was begun with "no", which `auto` is not on every machine."""
    folder, arguments = killed
    arguments = changed(arguments, run__precision="auto")
    ended = command("run", arguments, [LESS], env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert ended.code == 0, ended.stderr
    assert "run.precision: auto stays no, as when the run began; this machine would choose bf16" in ended.stderr
    assert_same(folder, reference)


def test_a_machine_that_cannot_have_the_precision_says_so(killed):
    folder, arguments = killed
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"precision: .*", "precision: fp16", text))
    assert "this run began with it" in error_of(command("run", changed(arguments, run__precision="auto")))


def test_what_auto_came_to_is_recorded(options, tmp_path):
    name = "-my run's"
    arguments = changed(options, run__output_dir=".", run__precision="auto", run__name=None, optim__max_steps=1)
    ended = command("run", [*arguments, f"--run.name={name}"], [LESS], folder=tmp_path)
    assert ended.code == 0, ended.stderr
    folder = tmp_path / name
    precision = json.loads((folder / "environment.json").read_text())["starts"][0]["precision"]
    assert f"\n  precision: '{precision}'\n" in (folder / "config.yaml").read_text().replace("bf16", "'bf16'")
    # the commands that it prints can be typed as they are
    typed = next(shlex.split(line.partition(":")[2]) for line in ended.stderr.splitlines() if " next:" in line)
    assert typed[2:4] == ["--run", f"./{name}"]
    again = command("run", [*arguments, f"--run.name={name}"], folder=tmp_path)
    assert shlex.split(again.stderr.partition(" is finished")[0]) == [f"./{name}"]


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_run_that_nobody_reads_goes_on(kind, killed, reference):
    folder, arguments = killed
    assert command("run", arguments, [LESS, ("stderr_left", kind)]).code == 0
    assert_same(folder, reference)


def test_a_rank_that_fits_a_budget_is_recorded_and_resumed(options, tmp_path):
    budget = {"peft__fit_budget": "true", "peft__max_trainable_parameters": 2500, "peft__lora_alpha": 8}
    arguments = changed(options, run__output_dir=tmp_path / "whole", optim__epochs=1, **budget)
    ended = command("run", arguments, [LESS])
    assert ended.code == 0, ended.stderr
    assert "rank 5 with lora_alpha 10 is the largest within 2,500 trained parameters" in ended.stderr
    text = (tmp_path / "whole" / "run" / "config.yaml").read_text()
    assert "\n  r: 5\n" in text and "\n  lora_alpha: 10\n" in text and "\n  fit_budget: true\n" in text
    arguments = changed(arguments, run__output_dir=tmp_path)
    assert command("run", arguments, [LESS, ("at_call", "train_step", 5)]).code == -signal.SIGKILL
    raised = command("run", changed(arguments, peft__max_trainable_parameters=3000), [UNREAD])
    assert "peft.max_trainable_parameters (there 2500, now 3000)" in error_of(raised)
    ended = command("run", arguments, [LESS])
    assert ended.code == 0, ended.stderr
    assert_same(tmp_path / "run", outcome(tmp_path / "whole" / "run"))


# --- training on ------------------------------------------------------------------------------------------------------


def test_a_new_run_starts_from_an_adapter(uninterrupted, options, tmp_path):
    """With a learning rate of 0 it ends where it starts."""
    old = uninterrupted[0] / "adapter"
    arguments = changed(options, run__output_dir=tmp_path, model__adapter=old, optim__learning_rate=0, optim__epochs=1)
    ended = command("run", arguments, [LESS, ("at_call", "train_step", 5)])
    assert ended.code == -signal.SIGKILL
    assert f"starting from the adapter {old}\n" in ended.stderr
    refused = command("run", changed(arguments, model__adapter=None))
    assert "was started with another adapter to start from" in error_of(refused)
    ended = command("run", arguments, [LESS])
    assert ended.code == 0, ended.stderr
    assert "continuing after step 3" in ended.stderr
    name = "adapter_model.safetensors"
    assert tensors(tmp_path / "run" / "adapter" / name).keys() == tensors(old / name).keys()
    for key, tensor in tensors(tmp_path / "run" / "adapter" / name).items():
        assert np.array_equal(tensor, tensors(old / name)[key]), key


def test_a_run_of_adalora_starts_another_of_more_steps(options, tmp_path):
    settings = {"peft__peft_type": "ADALORA", "peft__init_r": 4, "peft__target_r": 2, "peft__tinit": 1}
    settings |= {"peft__tfinal": 1, "peft__r": None, "run__output_dir": tmp_path, "data__test": None}
    for more in (
        {"run__name": "old", "optim__max_steps": 4},
        {"run__name": "new", "optim__max_steps": 5, "model__adapter": tmp_path / "old" / "adapter"},
    ):
        ended = command("run", changed(options, **settings, **more), [LESS])
        assert ended.code == 0, ended.stderr


def test_classes_that_stay_keep_their_rows_of_the_head(uninterrupted, options, tmp_path):
    old = uninterrupted[0] / "adapter"
    names = ["Business", "Health", "Sports", "World"]  # before: Business, Sci/Tech, Sports, World
    rows = [(text, "Health" if label == "Sci/Tech" else label) for text, label in topic_rows(61, seed=1)]
    renamed = {"data__train": write_csv(tmp_path / "renamed.csv", rows), "data__test": None, "optim__epochs": 1}
    arguments = changed(options, run__output_dir=tmp_path, model__adapter=old, optim__learning_rate=0, **renamed)
    arguments = changed(arguments, data__label_names=json.dumps(names[::-1]))
    ended = command("run", arguments, [LESS, ("at_call", "train_step", 5)])
    assert ended.code == -signal.SIGKILL
    assert "kept the head rows of 3 of 4 classes; new: 'Health'; dropped: 'Sci/Tech'\n" in ended.stderr
    ended = command("run", arguments, [LESS])
    assert ended.code == 0, ended.stderr
    before, after = (tensors(place / "adapter_model.safetensors") for place in (old, tmp_path / "run" / "adapter"))
    assert before.keys() == after.keys()
    row_of = {name: row for row, name in enumerate(json.loads((old / "labels.json").read_text()))}
    for name, tensor in after.items():
        if "out_proj" not in name:
            assert np.array_equal(tensor, before[name]), name
            continue
        for row, label in enumerate(names[::-1]):
            found = [other for other, there in row_of.items() if np.array_equal(tensor[row], before[name][there])]
            assert found == ([label] if label != "Health" else []), name


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model__adapter": "none"}, "model.adapter: none is not the adapter of a finished run"),
        ({"peft__lora_alpha": 64}, "was trained with peft.lora_alpha 8, and here it is 64"),
        ({"peft__target_modules": "[query]"}, "was trained with peft.target_modules ['query', 'value'], and here it"),
        (
            {"task__type": "multi_label", "task__separator": "|", "optim__label_smoothing": 0},
            "was trained for single_label, and the labels are multi",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_that_does_not_fit_is_refused(settings, says, uninterrupted, options, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path, model__adapter=uninterrupted[0] / "adapter")
    ended = command("run", changed(arguments, **settings), [LESS])
    assert says in error_of(ended)
    assert list(tmp_path.iterdir()) == []
