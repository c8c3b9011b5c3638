"""Numbers from start to end: one run is trained, interrupted, predicted with, exported and shown."""

import json
import random
import re
import shutil
import signal

import numpy as np
import pytest
from transformers import pipeline

from tests.harness.commands import changed, command, on_ranks
from tests.harness.data import TOPICS, topic_rows, write_csv
from tests.harness.runs import assert_same, distance, outcome, read_csv
from trainer.config.loading import load_config, parse_config
from trainer.training.setup import prepare

LESS = ("no_figures",)
NAMES = ["price", "depth"]
MEANS = dict(zip(TOPICS, (-30.0, 1.5, 10.0, 200.0), strict=True))


def write_rows(path, count, seed):
    chooser = random.Random(seed)
    rows = [
        (text, round(MEANS[topic] + chooser.gauss(0, 8), 3), round(chooser.gauss(0, 0.01) - MEANS[topic] / 1000, 5))
        for text, topic in topic_rows(count, seed)
    ]
    return write_csv(path, rows, ("text", *NAMES))


@pytest.fixture(scope="module")
def arguments(options, tmp_path_factory):
    """A small run whose configuration says nothing of the task but the columns and the loss."""
    folder = tmp_path_factory.mktemp("data")
    settings = {"optim__label_smoothing": 0, "evaluation__metric": None, "task__loss": "huber"}
    settings |= {"optim__learning_rate": "1e-3", "data__label_columns": "[price, depth]"}
    files = {"train": write_rows(folder / "train.csv", 61, 1), "test": write_rows(folder / "test.csv", 23, 2)}
    return changed(options, **settings, **{f"data__{name}": path for name, path in files.items()})


@pytest.fixture(scope="module")
def predicted(run, tmp_path_factory):
    """The texts of an input, the numbers that predict.py wrote for them [N, 2], and the metrics it printed."""
    place = tmp_path_factory.mktemp("predicted")
    source = write_rows(place / "new.csv", 17, 3)
    ended = command("predict", ["--run", run[0], "--input", source, "--output", place / "out.csv"])
    assert ended.code == 0, ended.stderr
    assert "holds the numbers of 'price', 'depth'" in ended.stderr
    header, *rows = read_csv(place / "out.csv")
    assert header == ["id", "prediction", "prediction:price", "prediction:depth"]
    numbers = np.array([row[2:] for row in rows], dtype=float)
    assert [json.loads(row[1]) for row in rows] == numbers.tolist()
    return [row[0] for row in read_csv(source)[1:]], numbers, json.loads(ended.stdout)


def constants_of(folder):
    return json.loads((folder / "adapter" / "task.json").read_text())


def test_the_task_is_found_and_recorded(run):
    folder, said = run
    assert "examples of 2 targets (task.type regression)" in said
    config = load_config(folder / "config.yaml")
    assert (config.task.type, config.task.loss, config.evaluation.metric) == ("regression", "huber", "loss")
    metrics = json.loads((folder / "evaluation" / "test" / "metrics.json").read_text())
    assert metrics["per_class"].keys() == set(NAMES) and {"mse", "mae", "pearson", "spearman", "r2"} <= metrics.keys()
    assert {kind: list(values) for kind, values in constants_of(folder).items()} == {"mean": NAMES, "scale": NAMES}
    header, *rows = read_csv(folder / "evaluation" / "test" / "predictions.csv")
    assert header == ["id", "label", "prediction", "prediction:price", "prediction:depth", "text"]
    errors = np.array([json.loads(row[1]) for row in rows]) - np.array([json.loads(row[2]) for row in rows])
    assert metrics["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-4)
    assert (folder / "evaluation" / "test" / "residuals.png").is_file()
    assert "onfusion" not in (folder / "report.html").read_text()


def test_a_killed_run_ends_in_the_same_bits_and_on_two_ranks_in_the_same_adapter(arguments, run, tmp_path):
    one, two = (changed(arguments, run__output_dir=tmp_path / name) for name in ("one", "two"))
    assert command("run", one, [LESS, ("at_call", "train_step", 8)]).code == -signal.SIGKILL
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for world_size, given in ((1, one), (2, two)):
        ranks = on_ranks(world_size, given, [LESS])
        assert [rank.code for rank in ranks] == [0] * world_size, ranks[0].stderr
    assert_same(tmp_path / "one" / "run", outcome(run[0]))
    assert distance(tmp_path / "two" / "run", run[0]) < 1e-5
    assert constants_of(tmp_path / "two" / "run") == constants_of(run[0])


def test_predictions_are_the_numbers_of_the_export_and_of_the_lines_of_the_card(
    run, predicted, tmp_path, monkeypatch, capsys
):
    texts, wanted, metrics = predicted
    scale = np.array(list(constants_of(run[0])["scale"].values()))
    true = np.array(read_csv(write_rows(tmp_path / "again.csv", 17, 3))[1:])[:, 1:].astype(float)
    assert metrics["mse"] == pytest.approx(((wanted - true) ** 2).mean(), rel=1e-4)
    assert command("export", ["--run", run[0], "--output", tmp_path / "model"]).code == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["problem_type"] == "regression"
    classify = pipeline("text-classification", model=str(tmp_path / "model"), device="cpu", top_k=None)
    answers = [{one["label"]: one["score"] for one in row} for row in classify(texts, truncation=True)]
    found = np.array([[row[name] for name in NAMES] for row in answers])
    assert np.abs((found - wanted) / scale).max() < 5e-6

    monkeypatch.chdir(run[0])
    card = (run[0] / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "Targets by number" in card
    lines = re.search(r"^```python\n(.*?)^```$", card, re.S | re.M)[1]
    capsys.readouterr()
    exec(lines.replace('["A text."]', repr(texts)), {})
    printed = [eval(line) for line in capsys.readouterr().out.splitlines()]
    found = np.array([[row[name] for name in NAMES] for row in printed])
    assert np.abs((found - wanted) / scale).max() < 5e-6
    assert np.ptp(wanted / scale, axis=0).min() > 1e-4, "the predictions tell texts apart"


def test_a_run_that_starts_from_an_adapter_keeps_its_units(arguments, run, tmp_path):
    """Else its logits would mean other numbers. A target that the adapter does not know has its own."""
    path = tmp_path / "other.csv"
    rows = read_csv(write_rows(path, 30, 5))[1:]
    write_csv(path, [(text, float(price) * 7, depth) for text, price, depth in rows], ("text", "price", "height"))
    given = changed(
        arguments, data__train=path, data__test=None, data__label_columns="[height, price]",
        model__adapter=run[0] / "adapter", run__output_dir=tmp_path,
    )  # fmt: skip
    constants = prepare(parse_config(list(map(str, given))), tmp_path / "run").corpus.constants
    for kind, values in constants_of(run[0]).items():
        assert constants[kind]["price"] == values["price"] and constants[kind]["height"] != values["depth"]
