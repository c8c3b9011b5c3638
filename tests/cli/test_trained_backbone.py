"""Which backbone it was: recorded, loaded again at its commit, and any other refused; and what the model card says."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, pipeline

from tests.harness.data import WORDS, topic_rows, write_csv
from tests.harness.processes import ROOT
from trainer.config.loading import parse_config
from trainer.config.predict_options import Copy, Options
from trainer.errors import UserError
from trainer.export import export
from trainer.predict import predict
from trainer.training.pipeline import train_and_report

OLD, NEW = 40 * "a", 40 * "b"
NAMES = {"World": "W\"o`r'ld\n## <b>", "Sports": "Spörts", "Business": "```", "Sci/Tech": "{0}\\"}
TEXTS = ["match goal team", "shares profit bank market", "an unknown word"]
TRAIN = """
import json, sys
import trainer.reporting.page
from trainer.errors import main_guard
from trainer.config.loading import parse_config
from trainer.run import main
trainer.reporting.page.build_report = lambda *_: "none"
sys.exit(max(main_guard(lambda: main(words)) for words in json.load(sys.stdin)))
"""
CARDS = """
import json, os, re, sys
texts, found = json.load(sys.stdin), {}
for run in sys.argv[1:]:
    os.chdir(run)
    card = open("adapter/README.md", encoding="utf-8").read()
    names = {}
    exec(re.search(r"^```python\\n(.*?)^```$", card, re.S | re.M)[1], names)
    answers = names["classify"](texts, truncation=True, top_k=None)
    found[os.path.basename(run)] = [{a["label"]: a["score"] for a in answer} for answer in answers]
print(json.dumps(found))
"""


def change(weights):
    """Moves every tensor of a weights file."""
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({k: v * 1.5 for k, v in tensors.items()}, weights, {"format": "pt"})


def decoder(folder):
    """A GPT-2 without a padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", model_input_names=names
    )
    fast.save_pretrained(folder)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(fast), bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_backbone):
    """Folder with a hub's cache, a package, and the runs hub, nli, package and decoder, all trained."""
    place = tmp_path_factory.mktemp("identity")
    for commit in (OLD, NEW):
        shutil.copytree(tiny_backbone, place / "hub" / "models--acme--tiny" / "snapshots" / commit)
    change(place / "hub" / "models--acme--tiny" / "snapshots" / NEW / "model.safetensors")
    (place / "hub" / "models--acme--tiny" / "refs").mkdir()
    (place / "hub" / "models--acme--tiny" / "refs" / "main").write_text(OLD)
    shutil.copytree(tiny_backbone, place / "packages" / "isotrain_fake" / "model")
    (place / "packages" / "isotrain_fake" / "__init__.py").touch()
    shutil.copytree(tiny_backbone, place / "nli")
    torch.manual_seed(0)
    settings = {"num_labels": 3, "problem_type": "multi_label_classification", "ignore_mismatched_sizes": True}
    AutoModelForSequenceClassification.from_pretrained(tiny_backbone, **settings).save_pretrained(place / "nli")
    decoder(place / "decoder")
    train = write_csv(place / "train.csv", topic_rows(40, seed=1))
    write_csv(place / "input.csv", [[text] for text in TEXTS], header=["text"])
    common = [
        "--data.train", train, "--data.max_length", 32, "--batch.size", 8, "--optim.max_steps", 4,
        "--checkpoint.every_steps", 2, "--run.output_dir", place / "runs", "--run.precision", "no",
        "--tracking.backends", "[]", "--peft.target_modules",
    ]  # fmt: skip
    names = json.dumps(NAMES)
    commands = [
        [*common, "[query,value]", "--run.name", "hub", "--model.name", "acme/tiny"],
        [*common, "[query]", "--run.name", "nli", "--model.name", place / "nli", "--data.label_names", names],
        [*common, "[query]", "--run.name", "package", "--model.name", "package:isotrain_fake/model"],
        [*common, "[c_attn]", "--run.name", "decoder", "--model.name", place / "decoder"],
    ]
    process(place, [sys.executable, "-c", TRAIN], [[str(word) for word in words] for words in commands])
    return place


def process(place, command, given):
    """Runs a command in its own process with the hub's cache and the package; returns its stdout."""
    paths = f"{ROOT}:{place / 'packages'}"
    environment = {**os.environ, "HF_HUB_CACHE": str(place / "hub"), "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    ended = subprocess.run(
        list(map(str, command)), input=json.dumps(given), capture_output=True, text=True, env=environment, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture
def hub(place, monkeypatch, tmp_path):
    """The hub's cache, as this process sees it, to change; and the package."""
    shutil.copytree(place / "hub", tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.syspath_prepend(place / "packages")
    return tmp_path / "hub" / "models--acme--tiny"


@pytest.fixture
def predicted(place, tmp_path):
    """Predicts with a run and an optional copy of its backbone; returns the rows."""

    def run(name, copy=None, quiet=True):
        folder = name if isinstance(name, os.PathLike) else place / "runs" / name
        output = tmp_path / "out.jsonl"
        predict(Options([str(folder)], str(place / "input.csv"), str(output), model=copy or Copy(), quiet=quiet))
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def record(run):
    return json.loads((run / "adapter" / "backbone" / "identity.json").read_text())


def refused(action):
    with pytest.raises(UserError) as caught:
        action()
    lines = str(caught.value).splitlines()
    assert len(lines) <= 2
    return lines


# --- the record -------------------------------------------------------------------------------------------------------


def test_the_record_of_a_hub_model(place):
    run = place / "runs" / "hub"
    found = record(run)
    assert (found["name"], found["revision"], found["commit"]) == ("acme/tiny", None, OLD)
    assert list(found["files"]) == ["config.json", "model.safetensors"]
    assert {len(digest) for digest in found["files"].values()} == {64}
    state = json.loads((run / "checkpoints" / "step-00000004" / "trainer_state.json").read_text())
    (start,) = json.loads((run / "environment.json").read_text())["starts"]
    summary = json.loads((run / "summary.json").read_text())
    assert state["backbone"] == start["backbone"] == summary["backbone"] == found
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("acme/tiny", OLD)
    cards = [(place / "runs" / name / "adapter" / "README.md").read_text() for name in ("hub", "nli")]
    assert ["base_model: acme/tiny\n" in cards[0], "base_model" in cards[1]] == [True, False]


# --- predict and export -----------------------------------------------------------------------------------------------


def test_a_branch_that_moved_changes_nothing(place, hub, predicted, tmp_path):
    before = predicted("hub")
    (hub / "refs" / "main").write_text(NEW)
    assert predicted("hub") == before
    shutil.rmtree(hub / "refs")
    assert predicted("hub") == before
    assert export(place / "runs" / "hub", tmp_path / "merged") == 0
    old, merged = (
        safetensors.torch.load_file(folder / "model.safetensors")
        for folder in (hub / "snapshots" / OLD, tmp_path / "merged")
    )
    name = "roberta.embeddings.word_embeddings.weight"
    assert torch.equal(old[name], merged[name])


def test_plain_peft_loads_the_commit(place, hub):
    (hub / "refs" / "main").write_text(NEW)
    model = AutoPeftModelForSequenceClassification.from_pretrained(place / "runs" / "hub" / "adapter", num_labels=4)
    old = safetensors.torch.load_file(hub / "snapshots" / OLD / "model.safetensors")
    found = model.get_base_model().roberta.embeddings.word_embeddings.weight
    assert torch.equal(found, old["roberta.embeddings.word_embeddings.weight"])


def test_another_revision_is_refused_and_named(place, hub, predicted, tmp_path):
    (hub / "refs" / "main").write_text(NEW)
    run = place / "runs" / "hub"
    for action in (
        lambda: predicted("hub", Copy(revision="main")),
        lambda: predicted("hub", Copy(name=str(hub / "snapshots" / NEW))),
        lambda: export(run, tmp_path / "merged", None, NEW),
    ):
        first, second = refused(action)
        assert first.startswith(f"{run} was trained on another backbone: SHA-256 of model.safetensors was ")
        assert f"(acme/tiny at commit {OLD}), is " in first and NEW in first
        assert f"--model.name acme/tiny --model.revision {OLD}, or --model.name FOLDER" in second
    assert not (tmp_path / "merged").exists()


def test_a_copy_elsewhere_is_accepted(place, hub, predicted, tmp_path):
    before = predicted("hub")
    copy = shutil.copytree(hub / "snapshots" / OLD, tmp_path / "copy")
    shutil.rmtree(hub)
    first, second = refused(lambda: predicted("hub"))
    assert f"'acme/tiny' was not found as a local folder, in the cache, or on the hub at commit {OLD}" in first
    assert second == "Name an unchanged copy of the run's backbone: --model.name FOLDER"
    assert predicted("hub", Copy(name=str(copy))) == before
    assert export(place / "runs" / "hub", tmp_path / "merged", str(copy), None) == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "backbone/identity.json"])
def test_a_damaged_file_of_the_adapter_is_named(place, hub, predicted, tmp_path, name):
    run = shutil.copytree(place / "runs" / "hub", tmp_path / "damaged")
    (run / "adapter" / name).write_text('{"name":')
    (said,) = refused(lambda: predicted(run))
    assert said.startswith("--run: ") and str(run / "adapter") in said and "cannot be read: " in said


def test_an_adapter_of_a_version_without_a_record_predicts_with_a_warning(place, predicted, tmp_path, capsys):
    run = shutil.copytree(place / "runs" / "nli", tmp_path / "old")
    (run / "adapter" / "backbone" / "identity.json").unlink()
    assert predicted(run) == predicted("nli")
    assert f"warning: {run} does not record its backbone: " in capsys.readouterr().err


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(place, hub, tmp_path, monkeypatch):
    """The run of the hub's model as after step 2, and a function that continues it with changed settings."""
    run = shutil.copytree(place / "runs" / "hub", tmp_path / "runs" / "hub")
    (run / "summary.json").unlink()
    for name in ("adapter", "checkpoints/step-00000004"):
        shutil.rmtree(run / name)
    monkeypatch.setattr("trainer.reporting.page.build_report", lambda *_: "none")
    monkeypatch.setattr("trainer.training.pipeline.StopRequest.listen", lambda _: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")

    def resume(**settings):
        config = parse_config(["--recipe", str(run / "config.yaml"), "--run.quiet", "true"])
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **settings))
        return train_and_report(config, run)

    return run, resume


def test_a_resume_loads_the_commit_it_began_with(place, hub, unfinished):
    (hub / "refs" / "main").write_text(NEW)
    run, resume = unfinished
    assert resume() == 0
    assert record(run) == record(place / "runs" / "hub")
    weights = [folder / "adapter" / "adapter_model.safetensors" for folder in (run, place / "runs" / "hub")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_resume_with_another_backbone_is_refused(hub, unfinished):
    (hub / "refs" / "main").write_text(NEW)
    run, resume = unfinished
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.name != ".lock")
    for settings in ({"revision": "main"}, {"name": str(hub / "snapshots" / NEW)}):
        first, second = refused(lambda settings=settings: resume(**settings))
        assert "trained on another backbone" in first and OLD in first and NEW in first
        assert OLD in second and "for a new run: --run.name NAME" in second
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.name != ".lock") == before


# --- the model card ---------------------------------------------------------------------------------------------------


def test_the_cards_lines_run_and_agree_with_predict(place, hub, predicted):
    runs = ["hub", "nli", "package", "decoder"]
    places = [place / "runs" / name for name in runs]
    found = json.loads(process(place, [sys.executable, "-c", CARDS, *places], TEXTS).splitlines()[-1])
    for name in runs:
        rows = predicted(name)
        wanted = [{key.partition(":")[2]: v for key, v in row.items() if ":" in key} for row in rows]
        assert [answer.keys() for answer in found[name]] == [row.keys() for row in wanted], name
        for answer, row in zip(found[name], wanted, strict=True):
            assert answer == pytest.approx(row, abs=1e-5), name
    assert set(found["nli"][0]) == set(NAMES.values())


@pytest.mark.parametrize("name", ["nli", "decoder"])
def test_a_merged_model_answers_by_name(place, predicted, tmp_path, name):
    assert export(place / "runs" / name, tmp_path / "merged") == 0
    answers = pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu")(TEXTS, batch_size=3)
    rows = predicted(name)
    assert [answer["label"] for answer in answers] == [row["prediction"] for row in rows]
    assert [answer["score"] for answer in answers] == pytest.approx([row["confidence"] for row in rows], abs=1e-4)
