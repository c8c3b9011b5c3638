"""trainer/compat.py alone touches private names of other libraries."""

import ast
from pathlib import Path

import pytest

TRAINER = Path(__file__).resolve().parents[2] / "trainer"
ALLOWED = {
    "os._exit",  # documented; ends a process whose other threads hang
    "parser._actions",  # argparse has no other list of its options, and config imports no torch, as compat does
}


def private_names(source):
    """Expressions and imports of `source` with a name that begins with one underscore and is not its own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield ast.unparse(node)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if any(map(is_private, alias.name.split("."))))
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.module}: {name}" for name in names if is_private(name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield ast.unparse(node)


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("path", sorted(TRAINER.rglob("*.py")), ids=lambda path: str(path.relative_to(TRAINER)))
def test_private_names_are_in_compat(path):
    if path != TRAINER / "compat.py":
        assert set(private_names(path.read_text(encoding="utf-8"))) <= ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "torch._foreach_norm(x)",
        "import torch._dynamo",
        "from torch.utils._pytree import tree_map",
        "from torch import _C",
        "getattr(model, '_no_split_modules', None)",
        "a.b._c.d",
    ],
)
def test_a_private_name_is_found(source):
    assert len(list(private_names(source))) == 1


def test_own_and_special_names_are_allowed():
    source = "from __future__ import annotations\nself._x = cls._y.z\n_helper(type(x).__name__)\nos.path.join(_root)"
    assert list(private_names(source)) == []
