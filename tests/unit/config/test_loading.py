import dataclasses
import os
import subprocess
import sys

import pytest

from tests.harness.processes import ROOT
from trainer.config.loading import (
    config_text,
    load_config,
    load_finished_run,
    option_names,
    parse_config,
)
from trainer.config.schema import (
    Config,
    DataConfig,
    Source,
    TaskConfig,
    fill_task,
    find_differences,
    identity,
    resolve,
)
from trainer.errors import UserError

TRAIN = ["--data.train", "train.csv"]


def parse(*arguments):
    return parse_config([*TRAIN, *arguments])


def problems(*arguments, train=True):
    with pytest.raises(UserError) as error:
        parse_config([*(TRAIN if train else []), *arguments])
    return str(error.value)


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "own.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_split_is_checked_with_the_settings_of_its_group():
    said = problems("--data.train.path", "x.csv", "--data.train.text_columns", "[label]", train=False)
    assert said == "data.train.label_column 'label' is also a text column"


# --- order ------------------------------------------------------------------------------------------------------------


def test_defaults_then_recipe_then_command_line(recipe):
    path = recipe("data: {train: a.csv}\nbatch: {size: 7}\noptim: {epochs: 5, learning_rate: 1e-4}\npeft: {r: 2}\n")
    config = parse_config(["--optim.epochs", "9", "--recipe", str(path), "--peft.r", "3"])
    assert config.optim.weight_decay == Config().optim.weight_decay
    assert config.batch.size == 7
    assert config.optim.learning_rate == 1e-4
    assert config.optim.epochs == 9
    assert config.peft.options == {"r": 3}
    assert config.recipe == "own"


def test_null_removes_a_peft_option_of_a_recipe(recipe):
    path = recipe("data: {train: t.csv}\npeft: {r: 2, lora_alpha: 4, max_trainable_parameters: 9}")
    peft = parse_config(["--recipe", str(path), "--peft.lora_alpha", "null"]).peft
    assert (peft.options, peft.max_trainable_parameters) == ({"r": 2}, 9)


def test_equals_sign_and_the_last_value_counts():
    config = parse("--batch.size=4", "--batch.size", "5", "--run.name=a=b")
    assert (config.batch.size, config.run.name) == (5, "a=b")


def test_a_value_with_dashes_needs_the_equals_sign():
    assert parse("--run.name=--x").run.name == "--x"
    assert problems("--run.name", "--run.seed", "5") == "--run.name needs a value"
    assert problems("--run.name") == "--run.name needs a value"
    assert parse("--run.name", "-5").run.name == "-5"


def test_recipe_paths_are_relative_to_the_recipe(tmp_path, recipe, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("train.csv", "[odd].csv", "part-1.csv"):
        (tmp_path / "data" / name).write_text("text,label\n")
    (tmp_path / "backbone").mkdir()
    path = recipe(
        "data: {train: data/train.csv, validation: 'data/[odd].csv', test: {path: 'data/part-*.csv'}}\n"
        "model: {name: backbone}\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = parse_config(["--recipe", str(path)])
    assert config.data.train == str(tmp_path / "data" / "train.csv")
    assert config.data.validation == str(tmp_path / "data" / "[odd].csv")
    assert config.data.test.path == str(tmp_path / "data" / "part-*.csv")
    assert config.model.name == str(tmp_path / "backbone")
    assert parse_config(["--recipe", "../own.yaml"]) == config


# --- values -----------------------------------------------------------------------------------------------------------


def test_yaml_numbers_and_text(recipe):
    path = recipe(
        "run: {precision: no, name: '1e5', quiet: true}\ndata: {train: x, label_names: [yes, no, on, 007]}\n"
        "optim: {learning_rate: 1e-4, eps: 1E-9, weight_decay: 0}\nmodel: {dropout: .5}\npeft: {x: 2e-3, y: off}\n"
    )
    config = parse_config(["--recipe", str(path)])
    assert config.run.precision == "no" and config.run.name == "1e5" and config.run.quiet is True
    assert config.data.label_names == ["yes", "no", "on", "007"]
    assert (config.optim.learning_rate, config.optim.eps, config.model.dropout) == (1e-4, 1e-9, 0.5)
    assert config.optim.weight_decay == 0
    assert config.peft.options == {"x": 2e-3, "y": "off"}


def test_command_line_values_are_parsed_by_type():
    config = parse(
        "--optim.learning_rate", "1e-4", "--run.precision", "no", "--run.name", "2024", "--optim.max_grad_norm", "null",
        "--data.text_columns", "[title, body]", "--data.label_names", "[no, yes]", "--optim.betas", "[0.8, 0.9]",
        "--optim.class_weights", "{a: 2, no: 0.5}", "--tracking.backends", "[]", "--run.quiet", "true",
        "--peft.target_modules", "[query, value]", "--peft.lora_dropout", "1e-1", "--peft.bias", "none",
        "--peft.peft_type", "ia3",
    )  # fmt: skip
    assert config.optim.learning_rate == 1e-4
    assert config.run.precision == "no" and config.run.name == "2024" and config.run.quiet is True
    assert config.optim.max_grad_norm is None
    assert config.data.text_columns == ["title", "body"] and config.data.label_names == ["no", "yes"]
    assert config.optim.betas == (0.8, 0.9) and config.optim.class_weights == {"a": 2, "no": 0.5}
    assert config.tracking.backends == []
    assert config.peft.options == {"target_modules": ["query", "value"], "lora_dropout": 0.1, "bias": "none"}
    assert config.peft.peft_type == "IA3"


WORDS = ["false", "true", "null", "~", "NA", "1.0", "yes", "no", "on", "1e3", "0x1", "2020-01-01", ".5", "007", "1:30"]


def test_class_names_are_text_as_written(recipe):
    listed, mapping = f"[{', '.join(WORDS)}]", "{" + ", ".join(f"{word}: {word}" for word in WORDS) + "}"
    named, weighed = dict(zip(WORDS, WORDS, strict=True)), dict.fromkeys(WORDS, 2)
    assert parse("--data.label_names", listed).data.label_names == WORDS
    assert parse("--data.label_names", mapping).data.label_names == named
    assert parse("--data.test", f"{{path: x, label_names: {mapping}}}").data.test.label_names == named
    assert parse("--data.test", "x", "--data.test.label_names", listed).data.test.label_names == WORDS
    weights = "{" + ", ".join(f"{word}: 2" for word in WORDS) + "}"
    assert parse("--optim.class_weights", weights).optim.class_weights == weighed
    text = f"data: {{train: {{path: x, label_names: &a {listed}}}, label_names: {mapping}, test: {{path: y, "
    text += f"label_names: *a}}}}\noptim: {{class_weights: {weights}}}\nevaluation: {{metric: f1/false}}"
    config = parse_config(["--recipe", str(recipe(text))])
    assert config.data.label_names == named and config.data.train.label_names == config.data.test.label_names == WORDS
    assert config.optim.class_weights == weighed and config.evaluation.metric == "f1/false"


@pytest.mark.parametrize("names", ["[[a]]", "{1: [a]}", "{[1]: a}", "{1: {a: b}}", "[a, '']", "{1: }", "{1: a, 1: b}"])
def test_label_names_must_be_texts(names):
    assert "data.label_names" in problems("--data.label_names", names)


def test_a_split_with_its_own_settings(recipe):
    expected = Source("x.csv", label_column="y", label_names={"1": "a"})
    fields = ["--data.test.label_column", "y", "--data.test.label_names", "{1: a}"]
    assert parse("--data.test", "x.csv", *fields).data.test == expected
    assert parse(*fields, "--data.test", "x.csv").data.test == expected
    assert parse(*fields, "--data.test.path", "x.csv").data.test == expected
    assert parse("--data.test", "{path: x.csv, label_column: y, label_names: {1: a}}").data.test == expected
    path = recipe("data: {train: t, test: x.csv}")
    assert parse_config(["--recipe", str(path), *fields]).data.test == expected
    path = recipe("data: {train: t, test: {path: x.csv, label_column: z, label_names: {1: a}}}")
    assert parse_config(["--recipe", str(path), *fields[:2]]).data.test == expected
    # another file is another layout
    assert parse_config(["--recipe", str(path), "--data.test", "other.csv"]).data.test == "other.csv"


@pytest.mark.parametrize("name", ["[a].csv", "[a", "a b.csv", "1", "é.csv"])
def test_paths_are_never_parsed_as_yaml(name):
    assert parse("--data.test", name).data.test == name


def test_a_repeated_yaml_key_is_refused(recipe):
    for text in ("data: {train: x}\ndata: {test: y}", "data:\n  train: x\n  train: y", "peft: {p: {a: 1, a: 2}}"):
        assert "is given twice" in problems("--recipe", str(recipe(text)))
    assert "data.label_names: " in problems("--data.label_names", "{1: a, 1: b}")


def test_anchors_and_merges_work_but_cycles_are_refused(recipe):
    path = recipe("data: &d {train: x, label_names: &n [a, b]}\npeft: {modules: *n}\n")
    assert parse_config(["--recipe", str(path)]).peft.options == {"modules": ["a", "b"]}
    assert "not valid YAML" in problems("--peft.x", "&a [*a]")
    assert "not valid YAML" in problems("--peft.x", "[" * 5000)


@pytest.mark.parametrize(
    "text",
    ["- a\n- b", "word", "", "data:\n\ttrain: x", "data: [x]", b"\xff\xfe", "a: !!python/object/apply:os.system [ls]",
     "data: {train: x}\n---\nrun: {}", "recipe: quickstart", "data: 'x"],
)  # fmt: skip
def test_a_file_that_is_not_a_recipe_is_refused(recipe, text):
    path = recipe(text)
    message = problems("--recipe", str(path))
    assert message.startswith(f"--recipe {path}: ") and "\n" not in message


# --- problems ---------------------------------------------------------------------------------------------------------


def test_all_problems_at_once(recipe):
    path = recipe("optim: {epochs: many}\nbatch: {sise: 3}\n")
    message = problems("--recipe", str(path), "--optim.leaning_rate", "1", "--run.seed", "x", "word", "--peft.r", "[1,")
    lines = message.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("unexpected argument 'word'") and lines[1].startswith("peft.r: not valid YAML")
    assert lines[2] == f"optim.epochs: 'many' is not valid; expected int (in {path})"
    assert lines[3] == f"unknown option 'batch.sise'; nearest: batch.size (in {path})"
    assert lines[4] == "unknown option 'optim.leaning_rate'; nearest: optim.learning_rate (on the command line)"
    assert lines[5] == "run.seed: 'x' is not valid; expected int (on the command line)"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.lr", "optim has name, learning_rate, "),
        ("learning_rate", "nearest: optim.learning_rate"),
        ("batch_size", "nearest: batch.size"),
        ("train.epochs", "nearest: optim.epochs"),
        ("data.test.labl_names", "nearest: data.test.label_names"),
        ("peft.options", "peft has peft_type, train, max_trainable_parameters, fit_budget"),
    ],
)
def test_unknown_option_names_the_nearest(key, nearest):
    assert problems(f"--{key}", "1").startswith(f"unknown option {key!r}; {nearest}")


def test_unknown_recipe_names_the_nearest():
    assert problems("--recipe", "quikstart").startswith("--recipe quikstart: no such recipe; nearest: quickstart")
    assert "shipped: " in problems("--recipe", "zzz") and "quickstart" in problems("--recipe", "zzz")
    said = problems("--recipe", "no/such.yaml")
    assert said.startswith("--recipe no/such.yaml: ") and "No such file" in said


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("batch.size", "1.5", "int"),
        ("optim.learning_rate", "fast", "float"),
        ("run.precision", "tf32", "'auto' or 'no' or 'fp16' or 'bf16'"),
        ("run.quiet", "perhaps", "true or false"),
        ("data.text_columns", "title", "list[str]; write [title]"),
        ("optim.betas", "[0.9]", "tuple[float, float]"),
        ("optim.class_weights", "{a: x}", "'balanced' or dict[str, float] or null"),
    ],
)
def test_a_wrong_type_names_the_expected_type(key, value, wanted):
    message = problems(f"--{key}", value)
    assert message.startswith(f"{key}: ") and message.endswith(f"is not valid; expected {wanted} (on the command line)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run.seed", "-1"], "run.seed: -1 must be from 0 to 2**63 - 1"),
        (["--data.max_length", "3"], "data.max_length: 3 must be at least 4"),
        (["--optim.learning_rate", ".inf"], "optim.learning_rate: inf must be at least 0"),
        (["--optim.betas", "[0.9, 1]"], "optim.betas: [0.9, 1.0] must be in [0, 1)"),
        (["--optim.warmup_fraction", "1.01"], "optim.warmup_fraction: 1.01 must be in [0, 1]"),
        (["--data.validation_fraction", "1"], "data.validation_fraction: 1.0 must be in [0, 1)"),
        (["--model.dropout", "-0.1"], "model.dropout: -0.1 must be in [0, 1)"),
        (["--optim.max_grad_norm", "0"], "optim.max_grad_norm: 0.0 must be above 0"),
        (["--optim.final_lr_fraction", "0.1", "--optim.schedule", "constant"], "optim.final_lr_fraction has no effect "
         "with optim.schedule constant; use linear or cosine"),
        (["--optim.name", "sgd", "--run.precision", "fp16"], "optim.name sgd with run.precision fp16: small "
         "gradients are lost; use bf16 or adamw"),
        (["--optim.name", "sgd", "--peft.peft_type", "adalora"], "optim.name sgd does not keep what peft.peft_type "
         "ADALORA learns of its ranks; use adamw or adam"),
        (["--optim.lora_b_lr_ratio", "4", "--peft.peft_type", "ia3"], "optim.lora_b_lr_ratio has no effect with "
         "peft.peft_type IA3; leave it out"),
        (["--data.text_columns", "[]"], "data.text_columns is empty: name at least one column"),
        (["--data.test", "{path: x, text_columns: []}"], "data.test.text_columns is empty: name at least one column"),
        (["--data.long_documents", "windows", "--data.text_pair_columns", "[b]"], "data.text_pair_columns: "
         "data.long_documents windows is for single texts; for pairs use cut"),
        (["--data.window_overlap", "8"], "data.window_overlap has no effect with data.long_documents cut; use windows"),
        (["--data.label_column", "text"], "data.label_column 'text' is also a text column"),
        (["--data.test="], "data.test is empty; use null for no split"),
        (["--data.train="], "data.train is missing: --data.train FILE (csv, tsv, json, jsonl, parquet) or hub id, or "
         "a --recipe"),
        (["--data.test.label_column", "x"], "data.test has settings but no path; add --data.test FILE"),
        (["--data.label_names", "[]"], "data.label_names: [] has no name, or an empty one"),
        (["--data.label_names", "[a, ' ']"], "data.label_names: ['a', ' '] has no name, or an empty one"),
        (["--data.label_names", "[1, 2, 1.0]"], "data.label_names: '1.0' is given twice"),
        (["--data.test", "{path: x, label_names: {1: a, 1.0: b}}"], "data.test.label_names: '1.0' is given twice"),
        (["--data.validation_fraction", "0", "--evaluation.patience", "1"], "evaluation.patience needs a validation "
         "split, but data.validation_fraction is 0"),
    ],
)  # fmt: skip
def test_invalid_values_and_combinations_are_refused(arguments, message):
    assert problems(*arguments) == message


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0b", "a\nb", "\udcff", "x" * 201])
def test_run_name_must_be_a_folder_name(name):
    assert problems(f"--run.name={name}") == (
        f"run.name: {name!r} must be a folder name, not a path (see run.output_dir)"
    )


# --- saved and compared -----------------------------------------------------------------------------------------------


def test_round_trip_of_awkward_texts(tmp_path):
    names = ["1e-4", "no", "null", "~", "true", "1_0", "0x1", "1:30", "2020-01-01", ".5", "1.", ".inf", "=", "<<",
             "#x", "- a", "a\nb", "a,b", "a: b", "é", "007", "5", "'", '"', "\U0001f600", "x" * 200]  # fmt: skip
    config = dataclasses.replace(
        parse("--run.name", "1e5", "--peft.r", "8", "--peft.rank_pattern", "{a.b: 3}", "--peft.bias", "none"),
        data=DataConfig(
            train=Source("a.csv", column_names=["1e3", "no"], label_names={name: name for name in names}),
            test="1e-3",
            label_names=names,
        ),
    )
    (tmp_path / "config.yaml").write_text(config_text(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


OTHER = {
    "run.seed": "7", "run.precision": "bf16", "data.validation_fraction": "0.2", "data.column_names": "[a]",
    "data.empty_text": "skip",
    "data.text_columns": "[b]", "data.text_pair_columns": "[c]", "data.label_column": "d", "data.label_names": "[e]",
    "data.label_columns": "[f, g]", "task.type": "multi_label", "task.separator": "|", "task.loss": "huber",
    "data.max_length": "9", "data.long_documents": "windows", "data.window_overlap": "3",
    "batch.size": "3", "model.dropout": "0.3", "model.quantization": "nf4", "peft.peft_type": "IA3", "peft.r": "3",
    "optim.name": "adam", "optim.learning_rate": "1", "optim.weight_decay": "0.5", "optim.betas": "[0, 0]",
    "optim.eps": "1", "optim.max_grad_norm": "null", "optim.schedule": "linear", "optim.warmup_fraction": "0.5",
    "optim.final_lr_fraction": "0.5",
    "optim.epochs": "9", "optim.max_steps": "9", "optim.label_smoothing": "0.5", "optim.class_weights": "balanced",
    "optim.lora_b_lr_ratio": "2",
    "evaluation.every_steps": "9", "evaluation.metric": "loss", "evaluation.patience": "9",
}  # fmt: skip
SAME = {
    "run.name": "x", "run.output_dir": "x", "run.resume": "never", "run.quiet": "true", "data.train": "x",
    "data.validation": "x", "data.test": "x", "batch.max_tokens": "9", "batch.eval_max_tokens": "9", "model.name": "x",
    "data.delimiter": "\\t", "data.encoding": "cp1252", "data.quoting": "none",
    "model.revision": "x", "model.adapter": "x", "model.packed": "false", "model.gradient_checkpointing": "true",
    "peft.max_trainable_parameters": "9", "checkpoint.every_steps": "9",
    "checkpoint.keep_last": "9", "tracking.every_steps": "9", "tracking.backends": "[]",
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER)
def test_identity_has_options_that_change_the_result(key):
    needed = ("--data.long_documents", "windows") if key == "data.window_overlap" else ()
    assert identity(parse(*needed, f"--{key}", OTHER[key])) != identity(parse(*needed))


def test_a_recipe_of_an_earlier_version_loads(tmp_path):
    recipe = tmp_path / "old.yaml"
    recipe.write_text("model: {compile: auto}\noptim: {schedule: cosine_annealing, final_lr_fraction: 0.1}\n")
    config = parse("--recipe", str(recipe))
    assert (config.optim.schedule, config.optim.final_lr_fraction) == ("cosine", 0.1)
    assert config.model == parse().model


@pytest.mark.parametrize(
    ("key", "value"),
    [("delimiter", ""), ("delimiter", ";;"), ("delimiter", '"'), ("delimiter", "\n"), ("encoding", "utf-9"),
     ("encoding", "base64"), ("encoding", ""), ("encoding", "a\0b"), ("quoting", "double"), ("empty_text", "drop")],
)  # fmt: skip
def test_invalid_formats_are_refused(key, value):
    for option in (f"data.{key}", f"data.test.{key}"):
        assert f"{option}: {value!r} " in problems("--data.test.path", "x", f"--{option}", value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--task.separator", ""], "task.separator is empty"),
        (["--task.separator", "|", "--task.type", "single_label"], "task.separator '|' is for task.type multi_label"),
        (["--data.label_columns", "[a]"], "data.label_columns: ['a'] must name at least two"),
        (
            ["--data.label_columns", "[a, a]"],
            "data.label_columns: ['a', 'a'] must name at least two columns",
        ),
        (["--data.label_columns", "[a, text]"], "data.label_columns: 'text' is also a text column"),
        (
            ["--data.label_columns", "[a, b]", "--task.type", "single_label"],
            "data.label_columns: for task.type",
        ),
        (
            ["--task.type", "several"],
            "task.type: 'several' is not valid; expected 'single_label' or 'multi_label' or 'regression'",
        ),
        (["--task.type", "regression", "--task.separator", "|"], "task.separator '|' is for task.type multi_label"),
        (["--task.type", "multi_label", "--task.loss", "huber"], "task.loss huber is for task.type regression"),
        (["--task.separator", "|", "--task.loss", "huber"], "task.loss huber is for task.type regression"),
    ],
)
def test_options_of_labels_that_do_not_fit(words, says):
    assert says in problems(*words)


def test_separators_are_taken_literally(tmp_path):
    for separator in ("|", ";", " ", "#", "&", ", ", ":"):
        config = parse("--task.separator", separator)
        assert config.task.separator == separator
        (tmp_path / "config.yaml").write_text(config_text(config), encoding="utf-8")
        assert load_config(tmp_path / "config.yaml") == config


def test_a_split_with_its_own_label_column_has_no_columns_of_labels():
    config = parse("--data.label_columns", "[a, b]", "--data.test", "x.csv", "--data.test.label_column", "c")
    assert resolve(config.data.test, config.data).label_columns == []
    assert resolve("y.csv", config.data).label_columns == ["a", "b"]


def test_what_the_labels_decide_may_be_left_out_later():
    recorded = fill_task(parse(), TaskConfig("multi_label"))
    assert recorded.evaluation.metric == "average_precision_macro"
    for words in ([], ["--task.type", "multi_label"], ["--evaluation.metric", "average_precision_macro"]):
        assert find_differences(recorded, parse(*words), by_name=True) == []
    for words in (["--task.type", "single_label"], ["--evaluation.metric", "loss"]):
        assert find_differences(recorded, parse(*words), by_name=True)
    for words in (["--task.type", "single_label"], []):  # as earlier versions recorded it
        old = parse(*words, "--evaluation.metric", "accuracy")
        assert find_differences(old, parse(), by_name=True) == []
    other = fill_task(parse("--evaluation.metric", "loss"), TaskConfig("single_label"))
    assert find_differences(other, parse(), by_name=True) == ["evaluation.metric (there 'loss', now 'accuracy')"]


def test_only_null_is_null_on_the_command_line():
    for text in ("#1", "~", "&x", "NULL", "null"):
        config = parse("--data.test", text, "--run.name", text)
        assert config.data.test == config.run.name == (None if text.lower() == "null" else text)


def test_identity_has_no_options_that_keep_the_result():
    assert {*OTHER} - {"peft.r"} | set(SAME) | {"peft.fit_budget", "peft.train"} == set(
        option_names()
    )  # they need another
    arguments = [word for key, value in SAME.items() for word in (f"--{key}", value)]
    assert identity(parse(*arguments)) == identity(parse())


def test_load_finished_run(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        load_finished_run(tmp_path)
    config = parse()
    (tmp_path / "config.yaml").write_text(config_text(config), encoding="utf-8")
    with pytest.raises(UserError, match="is not finished"):
        load_finished_run(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"labels\.json cannot be read"):
        load_finished_run(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "labels.json").write_text("null")
    with pytest.raises(UserError, match=r"labels\.json cannot be read"):
        load_finished_run(tmp_path)
    (tmp_path / "adapter" / "labels.json").write_text('["a", "b"]')
    assert load_finished_run(tmp_path) == (fill_task(config, TaskConfig("single_label")), ["a", "b"])


def test_no_variable_of_the_environment_sets_an_option():
    environment = {**os.environ, "JSONARGPARSE_DEFAULT_ENV": "true", "RUN_OPTIM__LEARNING_RATE": "-1"}
    code = (
        "from trainer.config.loading import parse_config\nfrom trainer.errors import main_guard\n"
        "main_guard(lambda: print(parse_config(['--data.train', 'x.csv']).optim.learning_rate))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("5e-05\n", "")
