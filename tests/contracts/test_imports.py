"""What must answer quickly imports no heavy library. (The layers are contracts of import-linter, in pyproject.toml.)"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("script", ["launcher", "run", "predict", "export", "report"])
def test_entry_points_answer_without_the_heavy_libraries(script):
    slow = ("torch", "transformers", "matplotlib.pyplot")
    code = f"import sys, trainer.{script}; print(*[name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
