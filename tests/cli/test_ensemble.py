"""predict.py with several runs, and with a pickled dataset: the contest from start to end."""

import json
import os
import pickle

import datasets
import numpy as np
import pytest

from tests.harness.commands import changed, command
from tests.harness.data import save_backbone, topic_rows, write_csv
from tests.harness.runs import read_csv

ROWS = topic_rows(40, seed=7)
CLASSES = ["Business", "Sci/Tech", "Sports", "World"]


@pytest.fixture(scope="module")
def runs(uninterrupted, options, tmp_path_factory):
    """Two finished runs with other backbones, lengths and orders of the classes."""
    place = tmp_path_factory.mktemp("second")
    save_backbone(place / "backbone", "bert")
    settings = {"model__name": place / "backbone", "run__output_dir": place, "data__max_length": 20, "optim__epochs": 1}
    ended = command("run", changed(options, **settings, data__label_names="[World, Sports, Business, Sci/Tech]"))
    assert ended.code == 0, ended.stderr
    return uninterrupted[0], place / "run"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("input") / "input.csv", ROWS)


def predict(source, output, *words):
    ended = command("predict", ["--input", source, "--output", output, *words])
    assert ended.code == 0, ended.stderr
    header, *rows = read_csv(output)
    return header, rows, ended


def probabilities(header, rows):
    """[N, 4], in the order of CLASSES."""
    columns = [header.index(f"probability:{name}") for name in CLASSES]
    return np.array([[float(row[i]) for i in columns] for row in rows])


def test_the_probabilities_of_two_runs_are_averaged(runs, labelled, tmp_path):
    alone = [probabilities(*predict(labelled, tmp_path / "one.csv", "--run", run)[:2]) for run in runs]
    mean = np.mean(alone, axis=0)
    assert np.abs(alone[0] - alone[1]).max() > 0.01 and np.std(alone, axis=1).min() > 0
    both = [["--run", runs[0], f"--run={runs[1]}"], ["--run", runs[1], "--run", runs[0]]]
    for words in both:
        header, rows, ended = predict(labelled, tmp_path / "both.csv", *words)
        assert np.abs(probabilities(header, rows) - mean).max() <= 2e-6
        assert [row[1] for row in rows] == [CLASSES[i] for i in mean.argmax(axis=1)]
        metrics = json.loads(ended.stdout)
        assert metrics["accuracy"] == np.mean(
            [CLASSES[i] == label for i, (_, label) in zip(mean.argmax(axis=1), ROWS, strict=True)]
        )
        assert "mean of 2 runs" in ended.stderr and "predicted (in train): " in ended.stderr
        shares = {name: (mean.argmax(axis=1) == i).mean() for i, name in enumerate(CLASSES)}
        assert {name: row["predicted"] for name, row in metrics["class_shares"].items()} == pytest.approx(shares)
    assert header[3:] == [f"probability:{name}" for name in ("World", "Sports", "Business", "Sci/Tech")]


def test_shares_beside_training_in_the_files_of_a_run(runs):
    summary = json.loads((runs[0] / "summary.json").read_text())["data"]["train"]
    metrics = json.loads((runs[0] / "evaluation" / "test" / "metrics.json").read_text())
    wanted = {name: count / summary["num_examples"] for name, count in summary["label_counts"].items()}
    assert {name: row["train"] for name, row in metrics["class_shares"].items()} == wanted
    assert sum(row["predicted"] for row in metrics["class_shares"].values()) == pytest.approx(1)


def test_one_kind_of_texts_only_is_a_shift(runs, tmp_path):
    source = write_csv(
        tmp_path / "input.csv", [(text,) for text, label in topic_rows(400) if label == "Sports"], ["text"]
    )
    _, rows, ended = predict(source, tmp_path / "out.csv", "--run", runs[0], "--text_columns", "[text]")
    found = [line for line in ended.stderr.splitlines() if "shares differ" in line]
    top = max(CLASSES, key=[row[1] for row in rows].count)
    assert len(found) == 1 and found[0].startswith("warning: ") and f"'{top}'" in found[0]


def test_runs_of_other_classes_are_refused(runs, labelled, tmp_path):
    labels = runs[1] / "adapter" / "labels.json"
    before = labels.read_text()
    labels.write_text(before.replace("World", "Weather"))
    words = ["--run", runs[0], "--run", runs[1], "--input", labelled, "--output", tmp_path / "out.csv"]
    ended = command("predict", words)
    labels.write_text(before)
    assert (ended.code, ended.stderr.count("\n")) == (2, 1)
    assert "'Weather'" in ended.stderr or "'World'" in ended.stderr
    assert str(runs[1]) in ended.stderr and not (tmp_path / "out.csv").exists()


def test_a_pickled_dataset_is_predicted_in_its_order(runs, labelled, tmp_path):
    texts = datasets.Dataset.from_dict({"text": [text for text, _ in ROWS]})
    order = [3, 1, *range(10, 40)]
    (tmp_path / "test_unlabelled.pkl").write_bytes(pickle.dumps(texts.select(order), 4))
    _, wanted, _ = predict(labelled, tmp_path / "csv.csv", "--run", runs[0])
    _, rows, ended = predict(tmp_path / "test_unlabelled.pkl", tmp_path / "pkl.csv", "--run", runs[0])
    assert [row[1:] for row in rows] == [wanted[i][1:] for i in order]
    assert [row[0] for row in rows] == [str(i) for i in range(len(order))]
    header, rows, _ = predict(
        tmp_path / "test_unlabelled.pkl", tmp_path / "out.csv", "--run", runs[0], "--layout", "contest"
    )
    assert (header, rows) == (["ID", "Label"], [[str(i), wanted[row][1]] for i, row in enumerate(order)])
    assert ended.stdout == ""


def test_a_hostile_pickle_is_one_line(runs, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Evil(), 4))
    ended = command("predict", ["--run", runs[0], "--input", tmp_path / "bad.pkl", "--output", tmp_path / "out.csv"])
    assert (ended.code, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith(f"error: --input: {tmp_path / 'bad.pkl'}: ") and "'posix.system'" in ended.stderr
    assert os.listdir(tmp_path) == ["bad.pkl"]
