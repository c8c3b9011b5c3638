"""The training command from end to end: what it leaves, what it says, and each of its larger options once."""

import json
import shutil

import numpy as np
import pytest

from tests.harness.commands import changed, command, run_script
from tests.harness.data import topic_rows, write_csv
from tests.harness.processes import ROOT
from tests.harness.runs import checkpoints, read_csv, records, tensorboard, tensors

LESS = ("no_figures",)
SCORES = {"accuracy", "f1_macro", "loss", "num_examples"}
SUMMARY = {
    "status", "recipe", "steps", "epochs", "world_size", "best_step", "validation", "test", "trainable_parameters",
    "total_parameters", "adapter_bytes", "train_seconds", "examples_per_second", "tokens_per_second",
    "padding_fraction", "peak_memory_bytes", "precision", "resumed_from",
}  # fmt: skip
SPLIT_FILES = [
    "classification_report.txt", "confusion_matrix.csv", "confusion_matrix.png",
    "metrics.json", "predictions.csv",
]  # fmt: skip
TAGS = {
    "train/loss", "train/epoch_loss", "train/grad_norm", "train/learning_rate", "validation/accuracy",
    "validation/f1_macro", "validation/loss", "validation/f1/Sci/Tech", "speed/examples_per_second",
    "speed/tokens_per_second", "speed/padding_fraction", "memory/peak_bytes", "final/test_accuracy",
}  # fmt: skip


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def trained(arguments, tmp_path, points=(LESS,), **options):
    """Runs a small run to its end; returns its folder and what it said."""
    ended = command("run", changed(arguments, run__output_dir=tmp_path, **options), points)
    assert ended.code == 0, ended.stderr
    return tmp_path / options.get("run__name", "run"), ended


# --- the real commands ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(options, tiny_backbone, fault_data, tmp_path_factory):
    """A run by the real command, from another folder, all paths relative: (that folder, the finished process)."""
    place = tmp_path_factory.mktemp("elsewhere")
    (place / "data").symlink_to(fault_data)
    (place / "backbone").symlink_to(tiny_backbone)
    relative = {"data__train": "data/train.csv", "data__test": "./data/test.csv", "model__name": "./backbone"}
    arguments = changed(options, **relative, run__output_dir="runs", optim__epochs=1)
    return place, arguments, run_script("run.py", arguments, cwd=place)


def test_the_run_folder(elsewhere):
    place, _, process = elsewhere
    assert process.returncode == 0, process.stderr
    assert process.stdout == ""
    folder = place / "runs" / "run"
    assert [path.name for path in (place / "runs").iterdir()] == ["run"]
    found = {path.name for path in folder.iterdir() if not path.name.startswith(("events.out.tfevents.", ".lock"))}
    assert found == {
        "config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "adapter", "evaluation", "figures",
        "report.html", "summary.json",
    }  # fmt: skip
    assert [path.name for path in checkpoints(folder)] == ["step-00000003", "step-00000006"]
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= {
        path.name for path in (folder / "adapter").iterdir()
    }
    for split in ("validation", "test"):
        assert sorted(path.name for path in (folder / "evaluation" / split).iterdir()) == SPLIT_FILES
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{name}.png" for name in ("loss", "accuracy", "learning_rate", "throughput")
    }
    times = {path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name}
    assert max(times) <= (folder / "summary.json").stat().st_ctime_ns  # its renaming was the last thing done
    assert not [path for path in folder.rglob("*") if "unfinished" in path.name or "pending" in path.name]


def test_the_summary(elsewhere):
    folder = elsewhere[0] / "runs" / "run"
    summary = summary_of(folder)
    assert summary.keys() >= SUMMARY
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["epochs"], summary["world_size"]) == (6, 1.0, 1)
    assert summary["resumed_from"] == []
    for split, count in (("validation", 20), ("test", 23)):
        assert summary[split].keys() == SCORES
        assert summary[split]["num_examples"] == count
        metrics = json.loads((folder / "evaluation" / split / "metrics.json").read_text())
        assert {name: metrics[name] for name in SCORES} == summary[split]
    assert summary["adapter_bytes"] == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert summary["total_parameters"] > summary["trainable_parameters"] > 0
    assert 0 <= summary["padding_fraction"] < 1
    assert all(summary[name] > 0 for name in ("train_seconds", "tokens_per_second", "peak_memory_bytes"))


def test_tensorboard(elsewhere):
    folder = elsewhere[0] / "runs" / "run"
    found = tensorboard(folder)
    assert found.keys() >= TAGS
    lines = records(folder)
    losses = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    assert [(step, pytest.approx(value)) for step, value in found["train/loss"]] == losses
    assert [step for step, _ in found["validation/loss"]] == [4, 6]


def test_the_same_command_again_and_the_run_used_from_another_folder(elsewhere, tmp_path):
    place, arguments, _ = elsewhere
    ended = command("run", arguments, folder=place)
    assert ended.code == 0
    assert "finished" in ended.stderr
    # the run was trained with relative paths; who uses it later stands elsewhere
    write_csv(tmp_path / "new.csv", [["match goal"]], header=["text"])
    output = tmp_path / "out.csv"
    ended = command("predict", ["--run", place / "runs" / "run", "--input", tmp_path / "new.csv", "--output", output])
    assert ended.code == 0, ended.stderr
    assert len(read_csv(output)) == 2


def test_accelerate_launch(options, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path, optim__max_steps=2, run__quiet="true")
    launch = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / "cpu.yaml"]
    process = run_script("run.py", arguments, launch, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert summary_of(tmp_path / "run")["steps"] == 2
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_plan_is_what_the_run_did_and_leaves_nothing(uninterrupted, options, tiny_backbone, tmp_path):
    backbone = shutil.copytree(tiny_backbone, tmp_path / "backbone")
    (backbone / "model.safetensors").unlink()  # no weights are needed
    arguments = changed(options, run__output_dir=tmp_path / "runs", model__name=backbone)
    ended = command("run", [*arguments, "--plan"], env={"ISOTRAIN_NUM_PROCESSES": "2"})
    assert ended.code == 0, ended.stderr
    assert not (tmp_path / "runs").exists()
    folder = uninterrupted[0]
    summary = summary_of(folder)
    state = json.loads((checkpoints(folder)[-1] / "trainer_state.json").read_text())["train"]
    epochs = round(summary["epochs"])
    assert f"\nadapter     {summary['adapter_bytes']:,} bytes\n" in ended.stdout
    assert f"\nsteps       {summary['steps']} of 8 examples: {epochs} epochs of" in ended.stdout
    assert f"\ntokens      {state['total']['tokens'] // epochs:,} an epoch; " in ended.stdout
    assert f"{summary['trainable_parameters']:,}  {summary['total_parameters']:>14,}  together" in ended.stdout
    assert "\npadding     0.0%: examples are packed; " in ended.stdout
    others = command("run", [*arguments, "--plan"], env={"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"})
    assert (others.code, others.stdout) == (0, "")


def test_the_planned_padding_is_that_of_the_run(options, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path, model__packed="false", optim__epochs=1)
    planned = command("run", [*arguments, "--plan"])
    assert planned.code == 0, planned.stderr
    folder, _ = trained(options, tmp_path, model__packed="false", optim__epochs=1)
    assert f"padding     {summary_of(folder)['padding_fraction']:.1%}: model.packed is false" in planned.stdout


def test_a_run_too_short_for_adalora_has_no_plan(options, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path, peft__peft_type="ADALORA", optim__max_steps=3)
    refused = command("run", [*arguments, "--peft.tinit", "2", "--peft.tfinal", "2", "--plan"])
    assert (refused.code, refused.stdout) == (2, "")
    assert "peft.tinit 2 and peft.tfinal 2: the 3 steps of the run leave none" in refused.stderr


def test_a_plan_for_a_method_with_indices(options, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path, peft__peft_type="SHIRA", peft__r=2, peft__lora_dropout=None)
    planned = command("run", [*arguments, "--plan"])
    assert planned.code == 0, planned.stderr
    assert "\nadapter     " in planned.stdout


def test_a_wrong_number_of_processes_has_no_plan(options):
    refused = command("run", [*options, "--plan"], env={"ISOTRAIN_NUM_PROCESSES": "two"})
    assert (refused.code, refused.stdout) == (2, "")
    assert refused.stderr == "error: ISOTRAIN_NUM_PROCESSES=two is not a number\n"


def test_a_run_ends_where_no_copy_of_the_model_fits(options, tmp_path):
    folder, _ = trained(options, tmp_path, [LESS, ("no_room_for_a_copy",)], optim__max_steps=1)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "summary.json").is_file()


# --- what decides about the outcome -----------------------------------------------------------------------------------


def test_the_best_adapter_is_that_of_the_best_evaluation(options, tmp_path):
    folder, _ = trained(options, tmp_path, evaluation__metric="accuracy")
    summary, lines = summary_of(folder), records(folder)
    accuracies, losses = (
        {line["step"]: line[tag] for line in lines if tag in line} for tag in ("validation/accuracy", "validation/loss")
    )
    assert len(accuracies) == 3
    assert summary["best_step"] == max(accuracies, key=accuracies.get)
    assert summary["best_step"] != summary["steps"], "this test needs a run whose last evaluation is not its best"
    # scored again at the end, from the adapter that was kept
    assert summary["validation"]["loss"] == pytest.approx(losses[summary["best_step"]], abs=1e-6)
    adapter = tensors(folder / "adapter" / "adapter_model.safetensors")
    best = tensors(checkpoints(folder)[-1] / "best_adapter.safetensors")
    last = tensors(checkpoints(folder)[-1] / "adapter_model.safetensors")
    assert adapter.keys() == best.keys() == last.keys()
    assert all(np.array_equal(adapter[name], best[name]) for name in best)
    assert any(not np.array_equal(adapter[name], last[name]) for name in best)


def test_patience_and_its_state_over_a_kill(options, tmp_path):
    # the accuracy of this backbone stands still, so no evaluation is better than the first
    stops = {"evaluation__metric": "accuracy", "evaluation__every_steps": 2, "evaluation__patience": 3}
    stops |= {"optim__epochs": 4, "checkpoint__every_steps": 2, "optim__learning_rate": "1e-5"}
    folder, ended = trained(options, tmp_path / "whole", **stops)
    summary = summary_of(folder)
    assert summary["stopped_early"]
    assert (summary["steps"], summary["best_step"]) == (8, 2)
    assert "early stopping at step 8: evaluation.patience 3 is used up; the best accuracy is 0." in ended.stderr
    arguments = changed(options, run__output_dir=tmp_path, **stops)
    assert command("run", arguments, [LESS, ("at_call", "train_step", 7)]).code == -9
    ended = command("run", arguments, [LESS])
    assert ended.code == 0, ended.stderr
    again = summary_of(tmp_path / "run")
    assert (again["steps"], again["best_step"], again["stopped_early"]) == (8, 2, True)
    assert again["resumed_from"] == [6]
    assert tensors(folder / "adapter" / "adapter_model.safetensors").keys()
    one, other = (place / "adapter" / "adapter_model.safetensors" for place in (folder, tmp_path / "run"))
    assert one.read_bytes() == other.read_bytes()


def test_no_validation_and_no_test(options, tmp_path):
    few = {"optim__max_steps": 2, "tracking__backends": "[]"}
    folder, ended = trained(options, tmp_path, data__validation_fraction=0, **few)
    summary = summary_of(folder)
    assert "validation" not in summary
    assert summary["best_step"] == 2
    last = checkpoints(folder)[-1] / "adapter_model.safetensors"
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == last.read_bytes()
    folder, ended = trained(options, tmp_path, data__test=None, run__name="untested", **few)
    assert "test" not in summary_of(folder)
    assert [path.name for path in (folder / "evaluation").iterdir()] == ["validation"]
    nothing = {"data__test": None, "data__validation_fraction": 0}
    ended = command(
        "run", changed(options, run__output_dir=tmp_path, run__name="neither", **nothing, **few), report=True
    )
    assert ended.code == 0, ended.stderr
    assert "warning" not in ended.stderr
    assert (tmp_path / "neither" / "report.html").is_file()


def test_text_pairs(options, tmp_path):
    rows = [(text, " ".join(reversed(text.split())), label) for text, label in topic_rows(40)]
    data = write_csv(tmp_path / "pairs.csv", rows, header=["first", "second", "label"])
    pairs = {"data__text_columns": "[first]", "data__text_pair_columns": "[second]", "data__test": data}
    folder, _ = trained(options, tmp_path, data__train=data, **pairs, optim__max_steps=2)
    table = read_csv(folder / "evaluation" / "test" / "predictions.csv")
    assert table[0][-2:] == ["text", "text_pair"]
    assert [tuple(row[-2:]) for row in table[1:]] == [row[:2] for row in rows]
    output = tmp_path / "out.csv"
    ended = command("predict", ["--run", folder, "--input", data, "--output", output])
    assert ended.code == 0, ended.stderr
    assert [row[1] for row in read_csv(output)[1:]] == [row[2] for row in table[1:]]
