"""Runs made by commit 702606d: a finished one still predicts and exports, and an unfinished one is continued.

Both were trained with the options below, on golden/inputs, which then lay in /tmp/training. The finished run has
`--optim.schedule cosine_annealing --optim.final_lr_fraction 0.1` as well. SIGTERM ended the other run after step 12.
old_runs/ holds what the commands read of them. `finished-predictions.csv` is what predict.py wrote then.
`unfinished-continued.safetensors` is the adapter of the second run without the signal.
"""

import csv
import shutil

import numpy as np
import pytest
import safetensors.numpy
from transformers import AutoModelForSequenceClassification

from tests.contracts.golden.record import INPUTS
from tests.faults.harness import command

OLD_RUNS = INPUTS.parents[1] / "old_runs"
OPTIONS = [
    "--data.max_length", "48", "--data.validation_fraction", "0.3", "--batch.size", "8", "--peft.r", "4",
    "--peft.lora_dropout", "0.1", "--peft.target_modules", "[query,value]", "--optim.learning_rate", "2e-2",
    "--optim.epochs", "10", "--evaluation.metric", "loss", "--checkpoint.every_steps", "5", "--run.precision", "no",
]  # fmt: skip
BACKBONE = ["--model.name", INPUTS / "tiny-roberta"]


def copied(name, place):
    """A copy of an old run that may be written to."""
    return shutil.copytree(OLD_RUNS / name, place / name)


def done(entry, *arguments):
    ended = command(entry, list(map(str, arguments)))
    assert ended.code == 0, ended.stderr
    return ended


def predictions(path):
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shares = [[float(value) for key, value in row.items() if key.startswith("probability:")] for row in rows]
    return [row["prediction"] for row in rows], np.array(shares), list(rows[0])


def test_an_old_finished_run_predicts_what_it_predicted_then(tmp_path):
    run, output = copied("finished", tmp_path), tmp_path / "predictions.csv"
    done("predict", "--run", run, "--input", INPUTS / "test.csv", "--output", output, *BACKBONE)
    classes, shares, header = predictions(output)
    old_classes, old_shares, old_header = predictions(OLD_RUNS / "finished-predictions.csv")
    assert header == old_header
    assert classes == old_classes and len(set(classes)) == 4
    assert np.abs(shares - old_shares).max() < 1.5e-6  # both are rounded to 6 digits


def test_an_old_finished_run_is_exported(tmp_path):
    run, output = copied("finished", tmp_path), tmp_path / "merged"
    done("export", "--run", run, "--output", output, *BACKBONE)
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert list(model.config.label2id) == ["Business", "Sci/Tech", "Sports", "World"]


def test_an_old_unfinished_run_is_continued(tmp_path):
    # Once the draw format changes, this becomes: exit code 2, one line, and nothing in the folder changed.
    run = copied("unfinished", tmp_path)
    data = ["--data.train", INPUTS / "train.csv", "--data.test", INPUTS / "test.csv"]
    done("run", *BACKBONE, *data, *OPTIONS, "--run.output_dir", tmp_path, "--run.name", "unfinished")
    continued = safetensors.numpy.load_file(run / "adapter" / "adapter_model.safetensors")
    expected = safetensors.numpy.load_file(OLD_RUNS / "unfinished-continued.safetensors")
    assert continued.keys() == expected.keys()
    for name, tensor in expected.items():
        assert continued[name] == pytest.approx(tensor, abs=1e-5), name
