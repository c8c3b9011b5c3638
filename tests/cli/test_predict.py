"""predict.py: every row once and in order, in every layout, with the numbers of plain PEFT."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

from tests.harness.commands import command, run_script
from tests.harness.data import topic_rows, write_csv
from tests.harness.runs import read_csv

CLASSES = ["Business", "Sci/Tech", "Sports", "World"]
ROWS = [*topic_rows(30, seed=7), ("no known word here", "World"), ('a, "quoted"\nline', "Sports")]


@pytest.fixture(scope="module")
def run(uninterrupted):
    return uninterrupted[0]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("input") / "input.csv", ROWS)


@pytest.fixture(scope="module")
def wanted(run):
    """Probabilities of ROWS by plain PEFT, one text at a time, [N, 4]."""
    model = AutoPeftModelForSequenceClassification.from_pretrained(run / "adapter", num_labels=4).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    with torch.no_grad():
        logits = [
            model(**tokenizer(text.strip(), truncation=True, max_length=48, return_tensors="pt")).logits[0]
            for text, _ in ROWS
        ]
    return torch.softmax(torch.stack(logits).double(), dim=1).numpy()


def predict(run, source, output, *options, points=()):
    quoting = ["--quoting", "multi_line"]  # a text of ROWS has two lines
    return command("predict", ["--run", run, "--input", source, "--output", output, *quoting, *options], points)


def refused(run, source, output, *options):
    ended = predict(run, source, output, *options)
    assert ended.code == 2
    assert "Traceback" not in ended.stderr
    assert not output.exists()
    return ended.stderr


def test_csv(run, labelled, wanted, tmp_path):
    ended = predict(run, labelled, tmp_path / "out.csv")
    assert ended.code == 0, ended.stderr
    header, *rows = read_csv(tmp_path / "out.csv")
    assert header == ["id", "prediction", "confidence", *(f"probability:{name}" for name in CLASSES)]
    assert [row[0] for row in rows] == [str(i) for i in range(len(ROWS))]
    found = np.array([row[3:] for row in rows], dtype=float)
    assert np.abs(found - wanted).max() <= 2e-6
    assert [row[1] for row in rows] == [CLASSES[i] for i in wanted.argmax(axis=1)]
    assert [float(row[2]) for row in rows] == found.max(axis=1).tolist()
    assert found.std(axis=0).min() > 0, "all rows alike would show no disorder"


def test_with_labels_also_the_metrics(run, labelled, wanted, tmp_path):
    ended = predict(run, labelled, tmp_path / "out.csv", "--quiet", "true")
    assert ended.stderr == ""
    metrics = json.loads(ended.stdout)
    right = [CLASSES[i] == label for i, (_, label) in zip(wanted.argmax(axis=1), ROWS, strict=True)]
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    assert metrics["num_examples"] == len(ROWS)
    loss = -np.log([wanted[i, CLASSES.index(label)] for i, (_, label) in enumerate(ROWS)]).mean()
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    ended = predict(run, labelled, tmp_path / "out.csv", "--ignore_labels", "true")
    assert (ended.code, ended.stdout) == (0, "")


def test_jsonl_in_and_out_without_labels(run, wanted, tmp_path):
    source = tmp_path / "input.jsonl"
    source.write_text("".join(json.dumps({"text": text, "more": 1}) + "\n" for text, _ in ROWS))
    ended = predict(run, source, tmp_path / "out.jsonl")
    assert (ended.code, ended.stdout) == (0, ""), ended.stderr
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [list(line) for line in found[:1]] == [
        ["id", "prediction", "confidence", *(f"probability:{name}" for name in CLASSES)]
    ]
    probabilities = np.array([[line[f"probability:{name}"] for name in CLASSES] for line in found])
    assert np.abs(probabilities - wanted).max() <= 1e-6
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(len(ROWS)))


def test_a_link_as_output_stays_one(run, labelled, tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "out.csv").symlink_to(tmp_path / "place" / "p.csv")
    ended = predict(run, labelled, tmp_path / "out.csv")
    assert ended.code == 0, ended.stderr
    assert (tmp_path / "out.csv").is_symlink()
    assert len(read_csv(tmp_path / "place" / "p.csv")) == 1 + len(ROWS)


def test_another_layout_of_columns_and_labels_counted_from_1(run, wanted, tmp_path):
    table = [(CLASSES.index(label) + 1, text) for text, label in ROWS]
    source = write_csv(tmp_path / "input.csv", table, header=None)
    columns = ["--column_names", "[class, title]", "--text_columns", "[title]", "--label_column", "class"]
    said = refused(run, source, tmp_path / "none.csv", *columns)
    assert "counts its labels" in said
    assert "--label_names" in said
    mapping = ["--label_names", "{1: Business, 2: Sci/Tech, 3: Sports, 4: World}"]
    ended = predict(run, source, tmp_path / "out.csv", *columns, *mapping)
    assert ended.code == 0, ended.stderr
    right = [CLASSES[i] == label for i, (_, label) in zip(wanted.argmax(axis=1), ROWS, strict=True)]
    assert json.loads(ended.stdout)["accuracy"] == pytest.approx(sum(right) / len(right))


def test_an_existing_output_is_replaced_whole(run, labelled, tmp_path):
    (tmp_path / "out.csv").write_text("old")
    ended = predict(run, labelled, tmp_path / "out.csv", points=[("full_disk", 1)])
    assert ended.code == 2
    assert "No space left" in ended.stderr
    assert (tmp_path / "out.csv").read_text() == "old"
    assert os.listdir(tmp_path) == ["out.csv"]
    assert predict(run, labelled, tmp_path / "out.csv").code == 0
    assert len(read_csv(tmp_path / "out.csv")) == len(ROWS) + 1


def test_the_input_is_not_written_over(run, labelled, tmp_path):
    source = tmp_path / "rows.csv"
    shutil.copy(labelled, source)
    (tmp_path / "link.csv").symlink_to(source)
    for given, output in ((source, source), (source, tmp_path / "link.csv"), (tmp_path / "row*.csv", source)):
        ended = predict(run, given, output)
        assert ended.code == 2 and ended.stderr.startswith(f"error: --output: {output} is the input or data of the run")
    assert source.read_bytes() == labelled.read_bytes()


def test_neither_the_run_nor_its_data_is_written_over(run, labelled, tmp_path, fault_data):
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    each = {
        run / "metrics.jsonl": "is in the run's folder",
        fault_data / "train.csv": "data of the run",
        folder: "cannot be written",
    }
    for output, said in each.items():
        before = output.read_bytes() if output.is_file() else None
        ended = predict(run, labelled, output)
        assert (ended.code, ended.stderr.count("\n")) == (2, 1) and said in ended.stderr
        assert before is None or output.read_bytes() == before


def test_two_processes_write_the_same_file(run, labelled, tmp_path):
    """By the real command. Without the "--", torchrun takes --run for an option of its own."""
    assert predict(run, labelled, tmp_path / "one.csv", "--max_tokens", "200").code == 0
    arguments = ["--run", run, "--input", labelled, "--output", tmp_path / "two.csv", "--max_tokens", "200"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--"]
    process = run_script("predict.py", [*arguments, "--quoting", "multi_line"], torchrun)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert json.loads(process.stdout)["num_examples"] == len(ROWS)
