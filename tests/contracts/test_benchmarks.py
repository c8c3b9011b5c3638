"""The kept results belong to the pinned versions, and the scripts still measure what they say."""

import json
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch

from benchmarks import dropout_cost, scale
from benchmarks import parity_with_trainer as parity
from tests.harness.processes import ROOT
from tests.parity import ranks

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def inputs(tmp_path):
    return tmp_path, parity.make_inputs(tmp_path, num_layers=1)


def test_results_are_those_of_the_pinned_versions():
    kept = json.loads((RESULTS / "parity_with_trainer.json").read_text())
    pins = dict(re.findall(r"^(\w+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    found = {name: kept["versions"][name].partition("+")[0] for name in parity.LIBRARIES}
    assert found == {name: pins[name] for name in parity.LIBRARIES}, "run benchmarks.parity_with_trainer again"
    assert parity.verdicts(kept["cases"])[0]
    assert {case["case"] for case in kept["cases"]} == {"plain torch", "Trainer", "Isotrain"}


def test_the_reference_is_what_isotrain_computes(inputs):
    from trainer.training.step import train_step

    folder, rows = inputs
    run = ranks.build(parity.isotrain_arguments(folder, "small", max_tokens=parity.SMALL))
    before = {name: parameter.detach().clone() for name, parameter in run.learner.parameters.items()}
    loss, expected = parity.reference_step(run.learner.model, rows)
    with torch.no_grad():
        for name, parameter in run.learner.parameters.items():
            parameter.copy_(before[name])
            parameter.grad = None
    start = parity.trained_tensors(run.learner.model)
    parts = run.plan.micro_batches(0, 0, 1)
    assert [len(part.ids) for part in parts] == parity.isotrain_cut(rows, 1, parity.SMALL)[0]
    result = train_step(run, 0, parts)
    step = result.loss, parity.weight_change(start, parity.trained_tensors(run.learner.model))
    row = parity.compared("Isotrain", "", [], step, (loss, expected))
    assert np.linalg.norm(expected) > 1e-2
    assert row["largest_difference"] < parity.TOLERANCE
    assert abs(result.loss - loss) < 1e-5
    assert parity.verdicts([row])[0]
    assert not parity.verdicts([{**row, "ratio": 1.1}])[0]


def test_trainer_multiplies_the_step_by_the_number_of_parts(inputs):
    """Where this fails, transformers has mended it: the README's table is out of date."""
    folder, rows = inputs
    reference = parity.reference_step(parity.load_model(folder), rows)
    step = parity.trainer_step(parity.load_model(folder), rows, folder, 4, 4)
    assert abs(parity.compared("Trainer", "", [], step, reference)["ratio"] - 4) < 1e-3


def test_the_cost_of_dropout_is_kept_for_every_model():
    kept = json.loads((RESULTS / "dropout_cost.json").read_text())
    assert [row["model"] for row in kept["rows"]] == dropout_cost.MODELS
    assert dropout_cost.markdown(kept["rows"]).count("\n") == 1 + len(dropout_cost.MODELS)


def test_scale_measures_everything(tiny_backbone, tmp_path):
    output = tmp_path / "scale.json"
    options = {"--min": 100, "--max": 100, "--tokenize-max": 10, "--model": tiny_backbone, "--folder": tmp_path}
    arguments = [*(str(word) for pair in options.items() for word in pair), "--output", output]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [row["measurement"] for row in rows] == ["read", "plan", "resume", "start"]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 2**20 for row in rows)
    assert scale.markdown(rows) in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json"]


def test_scale_tokenizes(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    scale.write_rows(tmp_path / "rows.csv", 50)
    found = scale.measure_tokenize({"file": str(tmp_path / "rows.csv"), "model": str(tiny_backbone), "workers": 2})
    assert found["tokens"] > 50 * 20 and found["seconds"] > 0


def test_scale_refuses_what_grows_too_much():
    def verdicts(name, few, many, **more):
        rows = [(10**6, few), (10**7, many)]
        return scale.verdicts(
            [{"measurement": name, "num_examples": n, "seconds": s, "peak_bytes": 2**30, **more} for n, s in rows]
        )

    assert verdicts("read", 2, 29) == []
    assert "grows more than linearly" in verdicts("read", 2, 31)[0]
    assert verdicts("resume", 0.1, 1, seconds_at={"0": 1, "last": 1.1}) == []
    assert "depends on the step" in verdicts("resume", 0.1, 1, seconds_at={"0": 1, "last": 2.1})[0]
    assert verdicts("start", 50, 59) == [] and verdicts("start", 50, 61)[0] == "a start takes 61 s and 1.00 GiB"
    assert "5.00 GiB" in verdicts("start", 50, 59, peak_bytes=5 * 2**30)[0]
