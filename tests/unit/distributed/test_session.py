"""What processes do together: the first collective, stop signals, the device, the precision, their number."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from trainer.distributed import session
from trainer.distributed.session import STOP_SIGNALS, StopRequest, check_device, choose_precision, start_accelerator
from trainer.errors import UserError
from trainer.training.step import first_signal


def test_a_failed_first_collective_names_the_setting_that_helps(ranks):
    group = ranks.start("ab", constants={"ERROR_GRACE_SECONDS": 1.0}, GLOO_SOCKET_IFNAME="no-such-interface")
    assert [rank.code() for rank in group] == [2, 2]
    for rank in group:
        assert "the first all-reduce failed: " in rank.said()
        assert rank.said().endswith("GLOO_SOCKET_IFNAME on CPUs\n")


# --- signals ---


@pytest.fixture
def handlers():
    """Puts the handlers of signals back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_summed_over_ranks(handlers, number):
    first, second = StopRequest(), StopRequest()
    for stop in (first, second):
        stop.deferred = True
        assert stop.listen()
        assert first_signal(stop.counts()) == 0
    signal.raise_signal(number)
    assert first.signal == 0 and second.signal == number
    sums = [float(sum(counts)) for counts in zip(first.counts(), second.counts(), second.counts(), strict=True)]
    assert first_signal(sums) == number


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_training_a_signal_exits_at_once(handlers, number):
    StopRequest().listen()
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(number)
    assert ended.value.code == 128 + number


def test_nohup_keeps_sighup_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopRequest().listen()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL


def test_outside_the_main_thread_no_handlers_are_installed(handlers):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(StopRequest().listen).result() is False


# --- precision and the number of processes ---


@pytest.mark.parametrize(
    ("wanted", "launched_with", "fast_bf16", "chosen"),
    [
        ("auto", None, True, "bf16"),
        ("auto", None, False, "no"),
        ("auto", "bf16", False, "bf16"),
        ("auto", "no", True, "bf16"),
        ("no", "bf16", True, "no"),
        ("bf16", "no", False, "bf16"),
    ],
)
def test_precision_on_a_cpu(unlaunched, wanted, launched_with, fast_bf16, chosen):
    if launched_with:
        unlaunched.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
    unlaunched.setattr(session, "has_fast_bf16", lambda: fast_bf16)
    assert choose_precision(wanted) == chosen


@pytest.mark.parametrize(("wanted", "launched_with"), [("fp16", "no"), ("auto", "fp16")])
def test_fp16_on_a_cpu_is_refused(unlaunched, wanted, launched_with):
    unlaunched.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
    with pytest.raises(UserError, match="fp16 on a CPU is dozens of times slower"):
        choose_precision(wanted)
    with pytest.raises(UserError, match="this run began with it"):
        choose_precision("fp16", begun=True)


@pytest.mark.parametrize(("has_bf16", "chosen"), [(True, "bf16"), (False, "fp16")])
def test_precision_on_a_gpu(unlaunched, has_bf16, chosen):
    unlaunched.setattr(torch.cuda, "is_available", lambda: True)
    unlaunched.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_precision("auto") == chosen
    unlaunched.setenv("ACCELERATE_USE_CPU", "true")
    unlaunched.setattr(session, "has_fast_bf16", lambda: True)
    assert choose_precision("auto") == "bf16"
    with pytest.raises(UserError, match="fp16 on a CPU"):
        choose_precision("fp16")


@pytest.mark.parametrize(
    ("planned", "cuda", "visible", "told", "message"),
    [
        (None, False, None, "", "nvidia-smi lists 2 GPUs that torch .* cannot use: .*\n.* ./launch.sh --topology cpu"),
        ("cuda", False, None, "true", "launch.sh planned for cuda \\(ISOTRAIN_DEVICE\\), but torch found cpu"),
        ("cpu", True, None, "false", "launch.sh planned for cpu \\(ISOTRAIN_DEVICE\\), but torch found cuda"),
        (None, False, "", "", None),
        (None, False, "-1", "", None),
        ("cpu", False, None, "true", None),
        ("cuda", True, None, "false", None),
    ],
)
def test_the_device_must_be_the_planned_one(unlaunched, tmp_path, planned, cuda, visible, told, message):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0: A100\necho GPU 1: A100\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    unlaunched.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    unlaunched.setattr(torch.cuda, "is_available", lambda: cuda)
    unlaunched.setattr(torch.cuda, "device_count", lambda: 2 * cuda)
    unlaunched.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("driver too old\nUpdate")))
    unlaunched.setenv("ACCELERATE_USE_CPU", told)
    for name, value in (("ISOTRAIN_DEVICE", planned), ("CUDA_VISIBLE_DEVICES", visible)):
        unlaunched.delenv(name, raising=False)
        if value is not None:
            unlaunched.setenv(name, value)
    if message is None:
        check_device()
    else:
        with pytest.raises(UserError, match=message):
            check_device()


def test_more_processes_than_gpus_are_refused(unlaunched):
    unlaunched.setattr(torch.cuda, "is_available", lambda: True)
    unlaunched.setattr(torch.cuda, "device_count", lambda: 2)
    unlaunched.delenv("ACCELERATE_USE_CPU", raising=False)
    for name, value in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "3")):  # all say so, not the third alone
        unlaunched.setenv(name, value)
    with pytest.raises(UserError, match="3 processes on this machine need a GPU each; torch sees 2"):
        check_device()


def test_another_precision_than_planned_is_refused(unlaunched):
    unlaunched.setenv("ISOTRAIN_PRECISION", "bf16")
    assert choose_precision("bf16") == "bf16"
    with pytest.raises(UserError, match=r"run\.precision is no, but launch\.sh planned bf16"):
        choose_precision("no")
    assert choose_precision("no", begun=True) == "no"  # launch.sh does not know what the run has begun with


def test_fp32_is_not_tf32_whatever_a_container_sets(unlaunched):
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    start_accelerator("no")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_a_wrong_number_of_processes_is_refused(unlaunched):
    unlaunched.setenv("ISOTRAIN_NUM_PROCESSES", "2")
    with pytest.raises(UserError, match=r"2 processes were requested \(ISOTRAIN_NUM_PROCESSES\), but 1 started"):
        start_accelerator("no")
