"""Every shipped recipe parses, says all that matters, and keeps its comments short."""

import re
from pathlib import Path

import pytest
import yaml

from trainer.config.loading import RECIPES, config_text, load_config, option_names, parse_config
from trainer.errors import UserError

FILES = sorted(RECIPES.glob("*.yaml"))
# What decides a result stands in the recipe, not in a default that may move.
COMPLETE = {
    "data.max_length", "batch.size", "model.name", "peft.peft_type", "peft.r", "peft.target_modules",
    "optim.learning_rate", "optim.schedule", "optim.epochs",
}  # fmt: skip
# A starting point for the user's own data; all others are runs, and name theirs, their budget and their optimizer.
TEMPLATES = {"own-csv", "own-numbers"}
RUNS = {"data.train", "data.test", "peft.max_trainable_parameters", "optim.name", "optim.weight_decay"}

recipes = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def data(path):
    return ["--data.train", "own.csv"] if path.stem in TEMPLATES else []


def parsed(path):
    return parse_config(["--recipe", path.stem, *data(path)])


@recipes
def test_parses_runs_on_every_device_and_is_saved_whole(path, tmp_path):
    config = parsed(path)
    assert (config.recipe, config.run.precision) == (path.stem, "auto")
    assert config == parse_config([*data(path), "--recipe", str(path)])
    (tmp_path / "config.yaml").write_text(config_text(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


@recipes
def test_is_complete(path):
    groups = yaml.safe_load(path.read_text(encoding="utf-8"))
    given = {f"{group}.{name}" for group, values in groups.items() for name in values}
    assert given >= COMPLETE
    assert path.stem in TEMPLATES or given >= RUNS
    assert not [name for name in given - set(option_names()) if not name.startswith("peft.")]


@recipes
def test_a_template_names_no_data(path):
    if path.stem in TEMPLATES:
        with pytest.raises(UserError, match=r"^data\.train is missing"):
            parse_config(["--recipe", path.stem])


@recipes
def test_local_data_stands_beside_it(path):
    config = parsed(path)
    for source in (config.data.train, config.data.validation, config.data.test):
        where = getattr(source, "path", source)
        if where is not None and Path(where).suffix and where != "own.csv":
            assert Path(where).is_absolute() and Path(where).is_file(), where


@recipes
def test_comments_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.lstrip().startswith("#")]
    assert lines[0].startswith("# "), "the first line says what the recipe is"
    assert len(comments) <= 20 and len(comments) <= len(lines) / 2
    assert max(map(len, lines)) <= 130
    assert not [line for line in lines if line != line.rstrip()]
    assert not re.search(r"#\S", "\n".join(comments).replace("#!", ""))
