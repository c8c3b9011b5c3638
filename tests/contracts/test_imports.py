"""What must answer quickly imports no heavy library. (The layers are contracts of import-linter, in pyproject.toml.)"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "module", ["launcher", "config.schema", "config.loading", "reporting.tracking", "reporting.page"]
)
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
