"""The run that all of this folder's tests interrupt, and what it leaves when nobody does."""

import shutil

import pytest

from tests.conftest import topic_rows, write_csv
from tests.faults.harness import changed, command, outcome

OPTIONS = {
    "data__max_length": 48,
    "data__validation_fraction": 0.3,
    "batch__size": 8,
    "batch__max_tokens": 100,
    "batch__eval_max_tokens": 120,
    "model__dropout": 0.1,
    "peft__r": 4,
    "peft__lora_dropout": 0.1,
    "peft__target_modules": "[query,value]",
    "optim__learning_rate": "2e-2",
    "optim__epochs": 2,
    "optim__label_smoothing": 0.1,
    "evaluation__every_steps": 4,
    "evaluation__metric": "loss",
    "run__name": "run",
    "run__precision": "no",
    "checkpoint__every_steps": 3,
    "tracking__every_steps": 2,
}


@pytest.fixture(scope="session")
def fault_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_csv(folder / "train.csv", topic_rows(61, seed=1))
    write_csv(folder / "test.csv", topic_rows(23, seed=2))
    return folder


@pytest.fixture(scope="session")
def options(tiny_backbone, fault_data):
    """Command line of a small run (dropout on, several micro-batches a step), but for run.output_dir."""
    data = {"data__train": fault_data / "train.csv", "data__test": fault_data / "test.csv"}
    return changed([], model__name=tiny_backbone, **data, **OPTIONS)


@pytest.fixture(scope="session")
def uninterrupted(options, tmp_path_factory):
    """Run folder of the uninterrupted run, and the processor time it took."""
    place = tmp_path_factory.mktemp("uninterrupted")
    ended = command("run", changed(options, run__output_dir=place), [("no_figures",)])
    assert ended.code == 0, ended.stderr
    return place / "run", ended.cpu_seconds


@pytest.fixture(scope="session")
def reference(uninterrupted):
    """What every interrupted run must leave in the end."""
    return outcome(uninterrupted[0])


@pytest.fixture(scope="session")
def _killed(options, tmp_path_factory):
    place = tmp_path_factory.mktemp("killed")
    stop = [("no_figures",), ("at_call", "train_step", 8)]
    ended = command("run", changed(options, run__output_dir=place), stop)
    assert ended.code == -9, ended.stderr
    return place / "run"


@pytest.fixture
def killed(_killed, options, tmp_path):
    """A run folder whose run was killed in step 8, with checkpoints of steps 3 and 6, and its command line."""
    shutil.copytree(_killed, tmp_path / "run")
    return tmp_path / "run", changed(options, run__output_dir=tmp_path)
