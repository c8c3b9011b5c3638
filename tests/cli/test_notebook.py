"""examples/agnews.ipynb, cell by cell: it installs nothing here, trains a few steps, shows the figures and predicts.

Jupyter itself is not needed: `!` lines become calls of `shell`, with {name} replaced, and pictures are collected.
"""

import json
import os
import re
import subprocess
import sys
import types

import pytest

from tests.harness.processes import ROOT
from tests.harness.runs import read_csv

NOTEBOOK = ROOT / "examples" / "agnews.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
OPTIONS = "--optim.max_steps 4 --evaluation.every_steps 4 --tracking.every_steps 2 --run.precision no --topology cpu"


def shell(line):
    """Runs a line as a kernel does, whose environment names a backend of matplotlib that only it has."""
    backend = "module://matplotlib_inline.backend_inline"
    environment = {**os.environ, "ISOTRAIN_PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "MPLBACKEND": backend}
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout + done.stderr


def run_cells(sources, pictures, monkeypatch):
    """Runs code cells in one namespace; returns all output of `!` lines."""
    display = types.ModuleType("IPython.display")
    display.Image, display.display = str, pictures.append
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    said = []
    names = {"_shell": lambda line: said.append(shell(line))}
    for source in sources:
        code = re.sub(r"^( *)!(.*)$", lambda match: f"{match[1]}_shell(f{match[2]!r})", source, flags=re.MULTILINE)
        exec(compile(code, NOTEBOOK.name, "exec"), names)
    return "".join(said)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """What a clone has, as links; the working folder is that of the notebook."""
    for name in ("launch.sh", "trainer", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    return tmp_path


def code_cells():
    return {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}


def test_the_notebook_runs(clone, monkeypatch):
    cells, pictures = code_cells(), []
    cells["parameters"] += f"\noptions = {OPTIONS!r}"
    said = run_cells(cells.values(), pictures, monkeypatch)
    assert sys.executable in said and "test: accuracy" in said
    names = {os.path.basename(path) for path in pictures}
    assert {"loss.png", "accuracy.png", "learning_rate.png", "confusion_matrix.png"} <= names
    assert all((clone / path).read_bytes().startswith(b"\x89PNG") for path in pictures)
    header, *rows = read_csv(clone / "predictions.csv")
    assert header[:2] == ["id", "prediction"] and len(rows) == 2
    # after the notebook has died: the same cells, from a kernel in the folder of the notebook
    monkeypatch.chdir(clone / "examples")
    again = [cells[name] for name in ("parameters", "setup", "launch")]
    assert "is finished" in run_cells(again, [], monkeypatch)


def test_the_notebook_is_clean():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert NOTEBOOK.read_text(encoding="utf-8") == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")] == []
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
