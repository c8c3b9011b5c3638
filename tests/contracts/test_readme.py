"""README and docs name what exists, and every command in them is accepted by the program that it starts.

A command is a line of a ```bash block, or inline code that begins with a program. Here it is planned and parsed, and
not carried out. What cannot be checked so is listed in NOT_CHECKED with the reason.
"""

import ast
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from tests.harness.processes import ROOT
from trainer import export, launcher, predict, report
from trainer.config.loading import RECIPES, parse_config
from trainer.errors import UserError

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS_OF_PYTHON = {"predict.py": predict, "export.py": export, "report.py": report}
NOT_CHECKED = {
    "source": "activates the environment of the clone",
    "tensorboard": "a server of another project",
    "srun": "needs Slurm; see tests/cli/test_slurm.py and tests/unit/test_launcher.py",
    "mpirun": "needs MPI; see tests/unit/distributed/test_environment.py",
    "torchrun": "starts processes; see tests/cli/test_predict.py",
    "accelerate": "starts processes; see tests/cli/test_run.py",
    "nohup": "needs a terminal that closes",
    "pip": "needs a package index",
}
PROGRAMS = {"./launch.sh", "./tests/run.sh", "python", "sbatch", *NOT_CHECKED}


def blocks(text):
    """(language, content) of the fenced blocks; prose has the language None."""
    language, lines = None, []
    for line in [*text.splitlines(), "```"]:
        if line.startswith("```"):
            yield language, "\n".join(lines)
            language, lines = (line[3:] if language is None else None), []
        else:
            lines.append(line)


def commands_of(page):
    """The commands of a page: the lines of its bash blocks, and inline code that starts a program with arguments."""
    for language, content in blocks(page.read_text(encoding="utf-8")):
        if language == "bash":
            yield from content.replace("\\\n", " ").splitlines()
        for code in re.findall(r"`([^`\n]+)`", content) if language is None else []:
            words, _ = split(code.replace(r"\|", "|"))
            if len(words) > 1 and words[0] in PROGRAMS:
                yield code.replace(r"\|", "|")


def split(command):
    """The words of a command, and the environment that it sets in front of them."""
    words = [word for word in shlex.split(command, comments=True) if word != "..."]
    environment = {}
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, value = words.pop(0).split("=", 1)
        environment[name] = value
    return words, environment


def check_launch(words, environment):
    """Plans a launch on a machine without GPUs, and parses the options that run.py would get."""
    if {"--help", "--setup-only"} & set(words):
        return
    options = launcher.parse_options(words)
    if options.verify:
        return  # tests/cli/test_verify.py runs it
    num_gpus = 2 if options.topology in ("gpu", "multi_gpu") else 0
    launcher.make_plan(options, launcher.Choice(sys.executable, "a test"), environment, num_gpus)
    try:
        parse_config(options.arguments)
    except UserError as error:
        if not str(error).startswith("data.train is missing"):  # an abbreviated command names no data
            raise


def check_python(words, capsys, monkeypatch):
    """Parses the options of a script of this project."""
    module = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    script, options = ROOT / module, [word for word in words[1:] if word.startswith("--")]
    assert script.is_file(), script
    if script.name == "run.py":
        check_launch(words[1:], {})
    elif script.name in COMMANDS_OF_PYTHON:
        monkeypatch.setattr(sys, "argv", [script.name, "--help"])
        with pytest.raises(SystemExit):
            COMMANDS_OF_PYTHON[script.name].main()
        helped = capsys.readouterr().out
        assert [option for option in options if not re.search(rf"{re.escape(option)}\b", helped)] == []
    else:
        source = script.read_text(encoding="utf-8")
        assert [option for option in options if f'"{option}"' not in source] == []


ALL = sorted({(str(page.relative_to(ROOT)), command) for page in PAGES for command in commands_of(page)})


@pytest.mark.parametrize(("page", "command"), ALL)
def test_the_command_is_accepted(page, command, capsys, monkeypatch):
    words, environment = split(command.split(" | ")[0])
    assert words and words[0] in PROGRAMS, f"{page}: add {words[:1]} to PROGRAMS, or to NOT_CHECKED with a reason"
    if words[0] in NOT_CHECKED:
        pytest.skip(NOT_CHECKED[words[0]])
    if words[0] == "./launch.sh":
        check_launch(words[1:], environment)
    elif words[0] == "./tests/run.sh" or words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word.split("::")[0]).exists() for word in words if word.startswith("tests/"))
    elif words[0] == "sbatch":
        script = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        assert (ROOT / words[script]).is_file()
        check_launch(words[script + 1 :], environment)
    else:
        check_python(words[1:], capsys, monkeypatch)


def test_a_wrong_command_would_be_found(capsys, monkeypatch):
    with pytest.raises(UserError):
        check_launch(["--recipe", "quickstart", "--optim.epoch", "2"], {})
    with pytest.raises(launcher.Mistake):
        check_launch(["--topology", "many"], {})
    with pytest.raises(AssertionError):
        check_python(["trainer/predict.py", "--outputs", "x"], capsys, monkeypatch)


def test_no_block_of_commands_is_missed():
    """A block without a language is output or a tree: no line of it starts a program."""
    for page in PAGES:
        for language, content in blocks(page.read_text(encoding="utf-8")):
            if language is not None and language != "bash":
                assert not [line for line in content.splitlines() if line.split(" ")[0] in PROGRAMS], page


def test_files_and_links_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        places = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        assert [link for link in places if not (page.parent / link).exists()] == [], page
        files = re.findall(r"`((?:tests|trainer|benchmarks|examples|docs|accelerate_configs)/[\w./-]*)[`:]", text)
        assert [file for file in files if not (ROOT / file).exists() and "NAME" not in file] == [], page


def test_the_readme_names_every_recipe_and_page():
    text = README.read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)) == sorted(
        p.stem for p in RECIPES.glob("*.yaml")
    )
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


def test_the_readme_counts_the_families_right():
    verdicts = [line for line in (ROOT / "tests" / "families.tsv").read_text().splitlines() if not line.startswith("#")]
    works = [line for line in verdicts if line.split("\t")[1].startswith("works")]
    assert f"{len(works)} of {len(verdicts)} families" in README.read_text(encoding="utf-8")


def test_the_readme_is_one_page():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert not [line for page in PAGES for line in page.read_text().splitlines() if re.search(r"\|\s*\|\s*$", line)]


def test_every_page_begins_with_what_its_reader_can_do():
    for page in PAGES[1:]:
        title, first = re.match(r"# (.+)\n\n(.+)", page.read_text(encoding="utf-8")).groups()
        assert first.startswith("After this page you "), f"{page}: {title}"


def test_the_map_names_every_package():
    text = Path(ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = sorted(path.parent.name for path in (ROOT / "trainer").glob("*/__init__.py"))
    assert [package for package in packages if f"`{package}/`" not in text] == []


def test_the_layers_are_those_that_are_checked():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert "```\n" + "\n".join(contracts[0]["layers"]) + "\n```" in text


def test_the_architecture_names_what_exists():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "trainer").rglob("*.py"))
    names = set(re.findall(r"`(?:\w+\.)?([A-Z]\w{2,}|[a-z]+(?:_[a-z]+)+|migrate|losses|train)`", text)) - {"NAME"}
    assert len(names) > 20
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", source)] == []


def test_the_way_to_backward_is_as_described():
    """Each function of the table calls the next one, and the last one calls backward."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \| `([\w/]+\.py)` \|", text.split("## From the command line")[1].split("\n\n")[1], re.M
    )
    assert [name for name, _ in rows][::4] == ["main", "add_gradient"] and len({file for _, file in rows}) <= 4
    for (name, file), called in zip(rows, [*(name for name, _ in rows[1:]), "backward"], strict=True):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        calls = [ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)]
        assert [call for call in calls if call.split(".")[-1] == called], f"{name} does not call {called}"
