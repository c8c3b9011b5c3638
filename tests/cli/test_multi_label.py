"""Several labels from start to end: one run is trained, interrupted, predicted with, exported and shown."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
from transformers import pipeline

from tests.harness.commands import changed, command, on_ranks
from tests.harness.data import TOPICS, topic_rows
from tests.harness.runs import assert_same, distance, outcome, read_csv, tensors
from trainer.config.loading import load_config

LESS = ("no_figures",)
NAMES = ["Business", "Sci/Tech", "Sports", "World", "even"]


def labels_of(i, topic):
    """Of each ninth row none, else its topic, that of the next row too, or also "even"."""
    following = list(TOPICS)[(i + 1) % len(TOPICS)]
    return [] if i % 9 == 0 else [topic, *([following] if i % 4 == 1 else []), *(["even"] if i % 2 == 0 else [])]


def write_rows(path, count, seed):
    rows = [{"text": text, "tags": labels_of(i, topic)} for i, (text, topic) in enumerate(topic_rows(count, seed))]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def arguments(options, tmp_path_factory):
    """A small run whose configuration says nothing of the task but the column."""
    folder = tmp_path_factory.mktemp("data")
    settings = {"optim__label_smoothing": 0, "optim__class_weights": "balanced", "evaluation__metric": None}
    settings |= {"optim__learning_rate": "1e-3", "data__label_column": "tags"}
    files = {"train": write_rows(folder / "train.json", 61, 1), "test": write_rows(folder / "test.json", 23, 2)}
    return changed(options, **settings, **{f"data__{name}": path for name, path in files.items()})


@pytest.fixture(scope="module")
def predicted(run, tmp_path_factory):
    """The texts of an input, and the header and rows that predict.py wrote for them, with the metrics it printed."""
    place = tmp_path_factory.mktemp("predicted")
    source = write_rows(place / "new.json", 17, 3)
    ended = command("predict", ["--run", run[0], "--input", source, "--output", place / "out.csv"])
    assert ended.code == 0, ended.stderr
    assert "joined by '|'" in ended.stderr
    header, *rows = read_csv(place / "out.csv")
    return [row["text"] for row in json.loads(source.read_text())], header, rows, json.loads(ended.stdout)


def thresholds_of(folder):
    return json.loads((folder / "adapter" / "task.json").read_text())["thresholds"]


def shares_of(answers):
    """Probabilities that a pipeline with top_k=None gave, in the order of NAMES, [N, 5]."""
    return np.array([[{entry["label"]: entry["score"] for entry in row}[name] for name in NAMES] for row in answers])


def test_labels_that_stay_keep_their_rows_of_the_head(run, arguments, tmp_path):
    old, names = run[0] / "adapter", ["World", "even", "Sports", "odd"]
    rows = [{"text": text, "tags": [*names[: 1 + i % 4]]} for i, (text, _) in enumerate(topic_rows(40, 1))]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    settings = {"data__train": tmp_path / "train.json", "data__test": None, "data__label_names": json.dumps(names)}
    settings |= {"run__output_dir": tmp_path, "model__adapter": old, "optim__learning_rate": 0, "optim__max_steps": 1}
    ended = command("run", changed(arguments, **settings), [LESS])
    assert ended.code == 0, ended.stderr
    assert "kept the head rows of 3 of 4 labels; new: 'odd'; dropped: 'Business', 'Sci/Tech'\n" in ended.stderr
    before, after = (tensors(place / "adapter_model.safetensors") for place in (old, tmp_path / "run" / "adapter"))
    for name in (name for name in after if "out_proj" in name):
        kept = [NAMES.index(label) for label in names[:3]]
        assert np.array_equal(after[name][:3], before[name][kept])
        assert not any(np.array_equal(after[name][3], row) for row in before[name])


def test_the_task_is_found_and_recorded(run):
    folder, said = run
    assert re.search(r"examples of 5 labels \(task\.type multi_label\)", said)
    config = load_config(folder / "config.yaml")
    assert (config.task.type, config.evaluation.metric) == ("multi_label", "average_precision_macro")
    metrics = json.loads((folder / "evaluation" / "test" / "metrics.json").read_text())
    assert {"f1_micro", "f1_macro", "f1_samples", "subset_accuracy", "average_precision_macro"} <= metrics.keys()
    assert list(thresholds_of(folder)) == NAMES and set(thresholds_of(folder).values()) != {0.5}
    assert {name: row["threshold"] for name, row in metrics["per_class"].items()} == thresholds_of(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test"]["f1_macro"] == metrics["f1_macro"] and "average_precision_macro" in summary["validation"]
    header, *rows = read_csv(folder / "evaluation" / "test" / "predictions.csv")
    assert header == ["id", "label", "prediction", *(f"probability:{name}" for name in NAMES), "text"]
    assert rows[0][1] == "" and rows[2][1] == "Business|even"
    page = (folder / "report.html").read_text()
    assert '<th class="number">threshold</th>' in page and "onfusion" not in page
    assert all(f"{value:.3f}" in page for value in thresholds_of(folder).values())


def test_a_second_start_finds_the_run_finished(arguments, run):
    given = changed(arguments, run__output_dir=run[0].parent)
    for more in ({}, {"task__type": "multi_label", "evaluation__metric": "average_precision_macro"}):
        ended = command("run", changed(given, **more))
        assert ended.code == 0 and "is finished" in ended.stderr
    for more in ({"task__type": "single_label"}, {"evaluation__metric": "f1_micro"}):
        ended = command("run", changed(given, **more))
        assert ended.code == 2 and "another configuration" in ended.stderr


def test_a_killed_run_ends_in_the_same_bits_and_on_two_ranks_in_the_same_adapter(arguments, run, tmp_path):
    one, two = (changed(arguments, run__output_dir=tmp_path / name) for name in ("one", "two"))
    assert command("run", one, [LESS, ("at_call", "train_step", 8)]).code == -signal.SIGKILL
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for world_size, given in ((1, one), (2, two)):
        ranks = on_ranks(world_size, given, [LESS])
        assert [rank.code for rank in ranks] == [0] * world_size, ranks[0].stderr
    assert_same(tmp_path / "one" / "run", outcome(run[0]))
    assert thresholds_of(tmp_path / "one" / "run") == thresholds_of(run[0])
    assert distance(tmp_path / "two" / "run", run[0]) < 1e-5
    assert thresholds_of(tmp_path / "two" / "run") == pytest.approx(thresholds_of(run[0]), abs=1e-5)


def test_predict_uses_the_thresholds(run, predicted):
    _, header, rows, metrics = predicted
    assert header == ["id", "prediction", *(f"probability:{name}" for name in NAMES)]
    thresholds = thresholds_of(run[0])
    sides = {name: set() for name in NAMES}
    for row in rows:
        assert row[1] == "|".join(name for name in NAMES if name in row[1].split("|"))
        for name, share in zip(NAMES, map(float, row[2:]), strict=True):
            if abs(share - thresholds[name]) > 2e-6:  # the file has six decimals
                assert (name in row[1].split("|")) == (share > thresholds[name])
                sides[name].add(share > thresholds[name])
    assert sum(side == {True, False} for side in sides.values()) >= 2, "no threshold divides the rows"
    rights = [row[1] == "|".join(sorted(labels_of(i, topic))) for i, (row, (_, topic)) in
              enumerate(zip(rows, topic_rows(17, 3), strict=True))]  # fmt: skip
    assert metrics["subset_accuracy"] == pytest.approx(np.mean(rights))


def test_an_unknown_label_and_a_damaged_file_of_thresholds_are_refused(run, tmp_path):
    source = tmp_path / "new.json"
    source.write_text(json.dumps([{"text": "a goal", "tags": ["Sports"]}, {"text": "a vote", "tags": ["Votes"]}]))
    given = ["--run", run[0], "--input", source, "--output", tmp_path / "out.csv"]
    ended = command("predict", given)
    assert ended.code == 2 and not (tmp_path / "out.csv").exists()
    assert all(word in ended.stderr for word in ("'Votes'", "row 2", "'Sports'", "--ignore_labels"))
    path = run[0] / "adapter" / "task.json"
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    try:
        ended = command("predict", [*given, "--ignore_labels", "true"])
    finally:
        path.write_bytes(content)
    assert ended.code == 2 and "task.json" in ended.stderr and "Traceback" not in ended.stderr


def test_an_export_and_the_lines_of_the_card_give_the_same_probabilities(run, predicted, tmp_path, monkeypatch):
    texts, _, rows, _ = predicted
    wanted = np.array([row[2:] for row in rows], dtype=float)
    assert command("export", ["--run", run[0], "--output", tmp_path / "model"]).code == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    classify = pipeline("text-classification", model=str(tmp_path / "model"), device="cpu", top_k=None)
    assert np.abs(shares_of(classify(texts, truncation=True)) - wanted).max() < 2e-6

    monkeypatch.chdir(run[0])
    card = (run[0] / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "Labels by number" in card and json.dumps(thresholds_of(run[0]), ensure_ascii=False) in card
    names = {}
    exec(re.search(r"^```python\n(.*?)^```$", card, re.S | re.M)[1], names)
    answers = names["classify"](texts, truncation=True, top_k=None)
    assert np.abs(shares_of(answers) - wanted).max() < 2e-6
