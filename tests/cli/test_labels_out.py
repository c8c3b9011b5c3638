"""predict.py as a user runs it for a contest: the labels and ids of the data, and what it says."""

import json

import pytest

from tests.harness.commands import command
from tests.harness.data import topic_rows, write_csv
from tests.harness.runs import read_csv

TEXTS = [text for text, _ in topic_rows(6, seed=3)]


@pytest.fixture(scope="module")
def run(uninterrupted):
    return uninterrupted[0]


def predict(run, source, output, *options):
    return command("predict", ["--run", run, "--input", source, "--output", output, *options])


def test_ids_and_labels_of_a_submission(run, tmp_path):
    source = write_csv(tmp_path / "test.csv", [(f"{7 * i}.0", text) for i, text in enumerate(TEXTS)], ("Id", "text"))
    ended = predict(run, source, tmp_path / "out.csv", "--layout", "contest")
    assert ended.code == 0, ended.stderr
    header, *rows = read_csv(tmp_path / "out.csv")
    assert header == ["ID", "Label"] and [row[0] for row in rows] == [str(7 * i) for i in range(6)]
    assert {row[1] for row in rows} <= {"World", "Sports", "Business", "Sci/Tech"}
    *lines, shares, about_columns = ended.stderr.splitlines()
    assert lines[-2:] == [  # a progress bar comes before
        f"warning: --input: {source}: column 'Id': ids such as '0.0' are written as '0'",
        f"6 predictions: {tmp_path}/out.csv",
    ]
    assert shares.startswith("predicted (in train): 'Business' ")
    labels = "Label holds the labels of the training data: 'Business', 'Sci/Tech', 'Sports', 'World'"
    assert about_columns == f"ID holds column 'Id' of the input; {labels}"
    assert predict(run, source, tmp_path / "row.csv", "--id_column", "").code == 0
    assert [row[0] for row in read_csv(tmp_path / "row.csv")[1:]] == list("012345")
    mapping = "{1: World, 2: Sports, 3: Business, 4: Sci/Tech}"
    ended = predict(run, source, tmp_path / "out.jsonl", "--layout", "contest", "--label_names", mapping)
    numbers = {"World": 1, "Sports": 2, "Business": 3, "Sci/Tech": 4}
    written = [json.loads(line)["Label"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == [numbers[row[1]] for row in rows]
    assert ended.stderr.endswith("Label holds the labels of --label_names: 3, 4, 2, 1\n")


def test_numbers_for_names(tiny_arguments, tiny_data, tmp_path):
    topics = {"World": 0, "Sports": 4, "Business": 4, "Sci/Tech": 4}
    rows = [(text, topics[label]) for text, label in topic_rows(40, seed=5)]
    train = write_csv(tiny_data / "numbers.csv", [*rows, *rows[:5]])
    start = tiny_arguments.index("--data.test")
    arguments = [*tiny_arguments[:start], *tiny_arguments[start + 2 :], "--data.train", train, "--optim.max_steps", "1"]
    arguments += ["--data.label_names", "{4: news, 0: 'false'}", "--optim.class_weights", "{false: 2}"]
    ended = command("run", [*arguments, "--evaluation.metric", "f1/false"])
    assert ended.code == 0, ended.stderr
    assert "duplicates within train; the held-out validation has none of its texts" in ended.stderr
    run = tmp_path / "runs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["label_values"] == {"4": "news", "0": "false"}
    assert summary["data"]["validation"]["num_in_train"] == 0
    source = write_csv(tmp_path / "test.csv", [(text,) for text in TEXTS], ("text",))
    ended = predict(run, source, tmp_path / "out.csv", "--layout", "contest")
    assert ended.stderr.endswith(
        "ID holds the row, counted from 0; Label holds the labels of the training data: 4, 0\n"
    )
    assert {row[1] for row in read_csv(tmp_path / "out.csv")[1:]} <= {"4", "0"}
