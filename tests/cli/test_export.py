"""export.py: a plain transformers model with the adapter's logits, or nothing."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from tests.harness.commands import changed, command
from tests.harness.data import topic_rows, write_csv
from tests.harness.runs import read_csv

LENGTH = 48  # data.max_length of the run
TEXTS = [text for text, _ in topic_rows(9, seed=5)]


@pytest.fixture(scope="module")
def run(uninterrupted):
    return uninterrupted[0]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "model"
    ended = command("export", ["--run", run, "--output", folder])
    assert ended.code == 0, ended.stderr
    return folder, ended


def logits(model, tokenizer):
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True)).logits


def test_the_logits_are_the_adapters(run, exported):
    folder, ended = exported
    assert f"exported to {folder}" in ended.stderr
    assert "logits within" in ended.stderr
    merged, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    apart = AutoPeftModelForSequenceClassification.from_pretrained(run / "adapter", num_labels=4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert torch.allclose(logits(merged, tokenizer), logits(apart, tokenizer), atol=1e-5)


def test_labels_tokenizer_and_pipeline(run, exported, tmp_path):
    folder, _ = exported
    names = ["Business", "Sci/Tech", "Sports", "World"]
    settings = json.loads((folder / "config.json").read_text())
    assert settings["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert settings["label2id"] == {name: i for i, name in enumerate(names)}
    assert settings["architectures"] == ["RobertaForSequenceClassification"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))
    assert not [name for name in os.listdir(folder) if "adapter" in name]
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "config.json").stat().st_mode}
    assert settings["problem_type"] == "single_label_classification"
    answers = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)(TEXTS)
    shares = [{answer["label"]: answer["score"] for answer in row} for row in answers]
    source = write_csv(tmp_path / "new.csv", [(text,) for text in TEXTS], ("text",))
    assert command("predict", ["--run", run, "--input", source, "--output", tmp_path / "out.csv"]).code == 0
    header, *rows = read_csv(tmp_path / "out.csv")
    predicted = [dict(zip(header, row, strict=True)) for row in rows]
    assert [max(row, key=row.get) for row in shares] == [row["prediction"] for row in predicted]
    for name in names:
        wanted = [float(row[f"probability:{name}"]) for row in predicted]
        assert [row[name] for row in shares] == pytest.approx(wanted, abs=2e-6)


def test_whoever_truncates_gets_the_length_of_training(run, exported):
    folder, _ = exported
    assert f"max_length: {LENGTH}\n" in (run / "config.yaml").read_text()
    for place in (folder, run / "adapter"):
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert len(tokenizer("match " * 100, truncation=True).input_ids) == LENGTH
        assert "max_length" not in json.loads((place / "tokenizer_config.json").read_text())


def test_an_existing_folder_is_refused_and_an_empty_one_used(run, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    for output in (taken, taken / "file"):
        ended = command("export", ["--run", run, "--output", output])
        assert ended.code == 2
        assert "give a new folder" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    (taken / "file").unlink()
    assert command("export", ["--run", run, "--output", "."], folder=taken).code == 0
    assert (taken / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("crooked_merge", "the merged model's logits differ by"),
        ("no_merge", "an adapter of type LORA cannot be merged: impossible to merge"),
    ],
)
def test_what_cannot_be_merged_leaves_nothing(run, tmp_path, fault, said):
    ended = command("export", ["--run", run, "--output", tmp_path / "model"], [(fault,)])
    assert ended.code == 2
    assert said in ended.stderr and "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(run, tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        ended = command("export", ["--run", run, "--output", tmp_path / "model"])
        assert ended.code == 2, ended.stderr
        assert "Traceback" not in ended.stderr
        assert "No space left" in ended.stderr
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_damaged_adapter_is_refused(run, tmp_path):
    damaged = shutil.copytree(run, tmp_path / "damaged")
    weights = damaged / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ended = command("export", ["--run", damaged, "--output", tmp_path / "model"])
    assert ended.code == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "model").exists()


KINDS = {
    "IA3": {"peft__feedforward_modules": "[]"},
    "LN_TUNING": {"peft__target_modules": "[LayerNorm]"},
    "VERA": {"peft__r": 8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_adapters(kind, options, tmp_path):
    settings = {"peft__peft_type": kind, "peft__r": None, "peft__lora_dropout": None, "optim__max_steps": 2}
    arguments = changed(options, run__output_dir=tmp_path, **{**settings, **KINDS[kind]})
    assert command("run", arguments, [("no_figures",)]).code == 0
    ended = command("export", ["--run", tmp_path / "run", "--output", tmp_path / "model"])
    assert ended.code == 0, ended.stderr
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    apart = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run" / "adapter", num_labels=4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert torch.allclose(logits(merged, tokenizer), logits(apart, tokenizer), atol=1e-5)
