"""Imports only point down: the rooms of the package, by what each may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEAVES = {"console", "config", "metrics", "figures", "checkpoint", "devices", "kernels", "labels"}
BELOW_THE_LOOP = LEAVES | {
    "tracking", "locks", "data", "tokenising", "batching", "optim", "philox", "masks", "dropout", "products",
    "attention", "packed", "graphs", "backbone", "model", "adapter", "evaluation", "environment",
    "meeting", "processes", "start_check",
}  # fmt: skip
ALLOWED = {
    **{leaf: set() for leaf in LEAVES},
    "checkpoint": {"console"},
    "config": {"console", "labels"},
    "metrics": {"labels"},
    "tracking": {"console", "figures"},
    "locks": {"config", "console"},
    **{module: {"config"} for module in ("environment", "options", "formats", "optim")},
    "batching": {"config", "devices"},
    "philox": {"devices"},
    "masks": {"devices", "kernels", "philox"},
    "backbone": {"config"},
    "processes": {"config", "devices", "environment", "meeting"},
    "meeting": {"config"},
    "dropout": {"kernels", "masks", "philox"},
    "reading": {"config", "formats"},
    "texts": {"config", "console", "formats", "labels", "locks", "reading"},
    "data": {"config", "labels", "reading", "texts"},
    "tokenising": {"data", "locks", "texts"},
    "products": {"dropout", "masks"},
    "attention": {"devices", "kernels", "masks"},
    "packed": {"attention", "dropout", "kernels", "masks", "products"},
    "graphs": {"attention", "batching", "config", "dropout", "packed"},
    "model": {"backbone", "config"},
    "adapter": LEAVES | {"backbone", "model"},
    "start_check": LEAVES | {"backbone", "batching", "data", "dropout", "packed", "tokenising"},
    "evaluation": LEAVES | {"batching", "packed"},
    "state": BELOW_THE_LOOP,
    "memory": BELOW_THE_LOOP | {"state"},
    "step": BELOW_THE_LOOP | {"state"},
    "loop": BELOW_THE_LOOP | {"memory", "state", "step"},
    "building": BELOW_THE_LOOP | {"state"},
    "pipeline": BELOW_THE_LOOP | {"building", "loop", "memory", "options", "report", "state"},
    "run": {"config", "console", "environment", "options", "pipeline", "reading"},
    "predict": BELOW_THE_LOOP | {"options", "reading"},
    "export": BELOW_THE_LOOP | {"options"},
    "report": LEAVES,
    "launcher": set(),
}


def imported(source):
    """Names of the modules of trainer/ that a source imports, anywhere in it, for types only included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("trainer.")}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            package, _, module = node.module.partition(".")
            if package == "trainer":
                names |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
    return names


def relative(source):
    return any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(ast.parse(source)))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import trainer.run", {"run"}),
        ("from trainer import loop, config", {"loop", "config"}),
        ("from trainer.data import x", {"data"}),
        ("def f():\n    from trainer.data import x", {"data"}),
        ("if TYPE_CHECKING:\n    from trainer.loop import x", {"loop"}),
        ("from trainerx.data import x\nimport torch", set()),
    ],
)
def test_every_way_to_import_is_seen(source, found):
    assert imported(source) == found


MODULES = sorted(path.stem for path in (ROOT / "trainer").glob("*.py") if path.stem != "__init__")


def test_every_module_has_its_place():
    assert set(MODULES) <= set(ALLOWED), "a new module needs a line in ALLOWED, and in the README's tree"
    assert (ROOT / "trainer" / "__init__.py").read_text(encoding="utf-8").count("import") == 0


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    source = (ROOT / "trainer" / f"{module}.py").read_text(encoding="utf-8")
    assert imported(source) <= ALLOWED[module]
    assert not relative(source)


@pytest.mark.parametrize("module", ["config", "options", "tracking", "report"])
def test_no_torch_where_an_answer_must_be_quick(module):
    heavy = ("torch", "transformers", "peft", "accelerate", "datasets")
    code = f"import sys, trainer.{module}; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("script", ["run", "predict", "export"])
def test_entry_points_answer_without_the_heavy_libraries(script):
    code = f"import sys, trainer.{script}; print(*[name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
