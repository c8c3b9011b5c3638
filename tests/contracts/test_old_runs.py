"""Runs made by commit 702606d: a finished one still predicts and exports, and an unfinished one is refused.

Both were trained with the options below, on golden/inputs, which then lay in /tmp/training. The finished run has
`--optim.schedule cosine_annealing --optim.final_lr_fraction 0.1` as well. SIGTERM ended the other run after step 12.
old_runs/ holds what the commands read of them. `finished-predictions.csv` is what predict.py wrote then.
The unfinished run has another draw format: it began with other dropout masks than this version draws.
"""

import csv
import shutil

import numpy as np
from transformers import AutoModelForSequenceClassification

from tests.contracts.golden.record import INPUTS
from tests.harness.commands import command

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


def test_an_old_unfinished_run_is_refused_and_left_as_it_was(tmp_path):
    run = copied("unfinished", tmp_path)
    before = contents(run)
    data = ["--data.train", INPUTS / "train.csv", "--data.test", INPUTS / "test.csv"]
    options = [*BACKBONE, *data, *OPTIONS, "--run.output_dir", tmp_path, "--run.name", "unfinished"]
    ended = command("run", list(map(str, options)))
    assert ended.code == 2
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    for part in (str(run), "dropout masks", "finish it with that version", "--run.name NAME"):
        assert part in line
    assert ended.stderr.splitlines()[-1] == line
    assert contents(run) == before


def contents(folder):
    """Each file's content; locks aside."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
