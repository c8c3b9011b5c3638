"""README names what is there, and its commands are accepted."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from trainer.config.loading import RECIPES, parse_config

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(("./", "python "))
]


def commands(program):
    return [pytest.param(words, id=" ".join(words)[:60]) for words in COMMANDS if program in words]


@pytest.mark.parametrize("words", commands("./launch.sh"))
def test_launch_commands_are_accepted(words):
    environment = {**os.environ, "ISOTRAIN_PYTHON": sys.executable}
    arguments = [word for word in words[1:] if word != "--help"]
    planned = subprocess.run(
        ["./launch.sh", "--dry-run", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert planned.returncode == 0, planned.stderr
    passed_on = planned.stdout.split("trainer/run.py", 1)[1]
    assert parse_config(shlex.split(passed_on)).data.train


@pytest.mark.parametrize("script", ["predict.py", "export.py"])
def test_options_of_the_other_commands_exist(script):
    helped = subprocess.run(
        [sys.executable, str(ROOT / "trainer" / script), "--help"], capture_output=True, text=True, check=True
    ).stdout
    used = [word for words in COMMANDS if f"trainer/{script}" in words for word in words if word.startswith("--")]
    assert used
    assert all(re.search(rf"{option}\b", helped) for option in used)


def test_map_names_every_folder():
    block = next(block for block in BLOCKS if block.startswith("launch.sh"))
    packages = sorted(path.parent.name for path in (ROOT / "trainer").glob("*/__init__.py"))
    assert sorted(re.findall(r"^  (\w+)/", block, re.MULTILINE)) == sorted([*packages, "recipes"])
    folders = re.findall(r"^(\w+)/", block, re.MULTILINE)
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_recipe_table_names_every_recipe():
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", README, re.MULTILINE)) == sorted(
        p.stem for p in RECIPES.glob("*.yaml")
    )


def test_pictures_are_there():
    assert all((ROOT / path).is_file() for path in re.findall(r"!\[.*?\]\((.*?)\)", README))
