"""Fixtures for all tests: a tiny backbone with tokenizer, tiny data, and the small run that tests interrupt or read."""

import os
import shutil
import signal

import pytest
import torch

from tests.harness.commands import changed, command
from tests.harness.data import AGNEWS, OPTIONS, make_tokenizer, save_backbone, topic_rows, write_csv
from tests.harness.runs import outcome

# before any import of the hub's libraries, which read this once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests start


def pytest_configure(config):
    torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) == signal.SIG_IGN:  # by nohup or a shell's &, and children would inherit it
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_verify.py")  # the longest file of all begins first


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    """Folder of a RoBERTa of 2 layers and random weights."""
    return save_backbone(tmp_path_factory.mktemp("backbone") / "tiny-roberta")


@pytest.fixture
def tiny_data(fault_data, tmp_path):
    """Folder with train.csv (61 rows) and test.csv (23 rows), for a test to change."""
    return shutil.copytree(fault_data, tmp_path / "data")


@pytest.fixture
def tiny_arguments(tiny_backbone, tiny_data, tmp_path):
    """Command line of a complete small run, about 5 s as a process."""
    places = {"data__train": tiny_data / "train.csv", "data__test": tiny_data / "test.csv"}
    places |= {"model__name": tiny_backbone, "run__output_dir": tmp_path / "runs"}
    return changed([], **places, **OPTIONS | {"run__name": "tiny"})


@pytest.fixture(scope="session")
def agnews():
    """Folder with a part of AG News, where this checkout has it beside itself."""
    if not AGNEWS.is_dir():
        pytest.skip(f"no AG News data in {AGNEWS}")
    return AGNEWS


@pytest.fixture(scope="session")
def fault_data(tmp_path_factory):
    """Folder with train.csv (61 rows) and test.csv (23 rows): sizes that divide by nothing."""
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
