"""Long documents from start to end: one run is trained in windows, interrupted, predicted with and exported."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
from transformers import FNetConfig, FNetForMaskedLM

from tests.harness.commands import changed, command, on_ranks
from tests.harness.data import make_tokenizer, topic_rows, write_csv
from tests.harness.runs import assert_same, distance, outcome, read_csv

LESS = ("no_figures",)
NAMES = ["Business", "Sci/Tech", "Sports", "World"]


@pytest.fixture(scope="module")
def arguments(options):
    """A small run most of whose documents have several windows; a document may be above the token budget."""
    windows = {"data__max_length": 16, "data__long_documents": "windows", "batch__max_tokens": 40}
    return changed(options, **windows, optim__learning_rate="5e-2", optim__epochs=2)


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory):
    """The folder of the uninterrupted run, and what it said."""
    place = tmp_path_factory.mktemp("uninterrupted")
    ended = command("run", changed(arguments, run__output_dir=place), [LESS])
    assert ended.code == 0, ended.stderr
    return place / "run", ended.stderr


def test_each_document_counts_once(run):
    folder, said = run
    assert re.search(r"note: [5-7]\d examples have several windows of 16 tokens", said)
    rows = read_csv(folder / "evaluation" / "test" / "predictions.csv")
    assert len(rows) == 1 + 23
    table = read_csv(folder / "evaluation" / "test" / "confusion_matrix.csv")
    assert sum(int(count) for row in table[1:] for count in row[1:]) == 23
    assert json.loads((folder / "summary.json").read_text())["test"]["num_examples"] == 23


def test_a_killed_run_ends_in_the_same_bits_and_on_two_ranks_in_the_same_adapter(arguments, run, tmp_path):
    killed = command("run", changed(arguments, run__output_dir=tmp_path / "one"), [LESS, ("at_call", "train_step", 5)])
    assert killed.code == -signal.SIGKILL
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for world_size, place in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        ranks = on_ranks(world_size, changed(arguments, run__output_dir=place), [LESS])
        assert [rank.code for rank in ranks] == [0] * world_size, ranks[0].stderr
    assert_same(tmp_path / "one" / "run", outcome(run[0]))
    assert distance(tmp_path / "two" / "run", run[0]) < 1e-5
    ended = command("run", changed(arguments, run__output_dir=tmp_path / "one", data__window_overlap=5))
    assert ended.code == 2 and "data.window_overlap" in ended.stderr


def test_predict_and_the_lines_of_the_card_read_the_same_windows(run, tmp_path, monkeypatch):
    rows = topic_rows(23, seed=2)  # of the test split
    source = write_csv(tmp_path / "new.csv", rows)
    ended = command("predict", ["--run", run[0], "--input", source, "--output", tmp_path / "out.csv"])
    assert ended.code == 0, ended.stderr
    header, *predicted = read_csv(tmp_path / "out.csv")
    tested = read_csv(run[0] / "evaluation" / "test" / "predictions.csv")
    columns = [tested[0].index(name) for name in header[1:]]
    assert [row[1] for row in predicted] == [row[columns[0]] for row in tested[1:]]
    found, wanted = (
        np.array([[float(row[i]) for i in places] for row in table], dtype=float)
        for table, places in ((predicted, range(3, 7)), (tested[1:], columns[2:]))
    )
    assert np.abs(found - wanted).max() < 2e-6

    monkeypatch.chdir(run[0])
    card = (run[0] / "adapter" / "README.md").read_text(encoding="utf-8")
    loading, windows = re.findall(r"^```python\n(.*?)^```$", card, re.S | re.M)
    names = {}
    exec(loading, names)
    cut = []
    for i, (text, _) in enumerate(rows[:6]):
        shown = []
        exec(windows.replace("A long text.", text), names | {"print": shown.append})
        scores = {entry["label"]: entry["score"] for entry in shown[0]}
        assert np.abs(np.array([scores[name] for name in NAMES]) - found[i]).max() < 2e-6
        cut.append({entry["label"]: entry["score"] for entry in names["classify"](text, truncation=True, top_k=None)})
    apart = [abs(scores["World"] - row[3]) for scores, row in zip(cut, found[:6], strict=True)]
    assert max(apart) > 1e-4, "one window gives the same: nothing is tested"


def test_a_run_that_cuts_many_texts_names_the_option(arguments, tmp_path):
    given = changed(arguments, run__output_dir=tmp_path, data__long_documents="cut")
    ended = command("run", given, [LESS, ("at_call", "train_step", 1)])
    assert re.search(r"note: [5-7]\d examples fill all 16 tokens .*data\.long_documents windows", ended.stderr)


def test_a_model_whose_logits_depend_on_padding_is_refused(arguments, tmp_path):
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "max_position_embeddings": 64}
    FNetForMaskedLM(FNetConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "fnet")
    tokenizer.save_pretrained(tmp_path / "fnet")
    changes = {"model__name": tmp_path / "fnet", "peft__target_modules": "all-linear", "run__output_dir": tmp_path}
    ended = command("run", changed(arguments, **changes), [LESS])
    assert ended.code == 2 and "Traceback" not in ended.stderr
    assert all(word in ended.stderr for word in ("data.long_documents windows", "padding", "use cut")), ended.stderr


def test_memory_for_less_than_a_document(arguments, tmp_path):
    given = changed(arguments, run__output_dir=tmp_path)
    ended = command("run", given, [LESS, ("out_of_memory", 20, "backward")])
    assert ended.code == 2 and "Traceback" not in ended.stderr
    assert all(word in ended.stderr for word in ("step 1", "single example", "data.long_documents cut")), ended.stderr


def test_an_export_says_that_a_pipeline_cuts(run, tmp_path):
    ended = command("export", ["--run", run[0], "--output", tmp_path / "model"])
    assert ended.code == 0 and all(word in ended.stderr for word in ("pipeline", "16 tokens", "stride=4"))
