"""How processes meet, agree and stop together; precision, and what one process is told of the others."""

import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import wait

import psutil
import pytest
import torch
from torch.distributed import HashStore

from tests.unit.distributed.obedient import (
    Ranks,
    announce_a_closed_port,
    die_before_the_line,
    heed_signals,
    meet_among_strangers,
)
from trainer.distributed import rendezvous
from trainer.distributed.session import STOP_SIGNALS, StopRequest, check_device, choose_precision, start_accelerator
from trainer.errors import UserError
from trainer.training.step import first_signal

LOST = os.EX_TEMPFAIL


@pytest.fixture
def ranks():
    ranks = Ranks()
    yield ranks
    ranks.kill()


def errors_of(ranks):
    """What was said about errors, by rank; "" for those that said nothing."""
    return [rank.said().strip() for rank in ranks]


def leave(ranks):
    for rank in ranks:
        rank.tell("leave")
    for rank in ranks:
        assert rank.answer() == "gone in peace"


# --- stopping together ---


@pytest.mark.parametrize(("lost", "speakers"), [(0, (1, 2)), (2, (0, 3)), (3, (0, 2))])
def test_a_process_that_dies_is_missed_at_once_and_named_once_a_machine(ranks, lost, speakers):
    group = ranks.meet("aabb", constants={"HEARTBEAT_TIMEOUT_SECONDS": 600})
    group[lost].kill()
    others = [rank for rank in range(4) if rank != lost]
    assert [group[rank].code() for rank in others] == [LOST] * 3
    error = (
        f"error: rank {lost} on host-{'aabb'[lost]} (127.0.0.1) was lost in step 7: its process has ended\n"
        "Files on disk are complete. Run the same command again to resume."
    )
    assert errors_of(group) == [error if rank in speakers else "" for rank in range(4)]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_shows_no_life_is_missed_and_ends_when_it_wakes(ranks, stopped):
    group = ranks.meet("abc", constants={"HEARTBEAT_TIMEOUT_SECONDS": 1.0})
    os.kill(group[stopped].pid, signal.SIGSTOP)
    others = [rank for rank in range(3) if rank != stopped]
    assert [group[rank].code() for rank in others] == [LOST] * 2
    for rank in others:
        assert f"rank {stopped} on host-{'abc'[stopped]} (127.0.0.1) was lost in step 7: no heartbeat for 1 s" in (
            group[rank].said()
        )
    os.kill(group[stopped].pid, signal.SIGCONT)
    assert group[stopped].code() == LOST
    assert "was lost in step 7" in group[stopped].said()


def test_nobody_is_missed_who_only_waits(ranks):
    group = ranks.meet("ab", constants={"HEARTBEAT_TIMEOUT_SECONDS": 0.5})
    assert wait([rank.end for rank in group], 2) == []
    leave(group)


@pytest.mark.parametrize(
    ("failing", "order", "code", "message"),
    [
        (0, "refuse", 2, "no such file"),
        (2, "refuse", 2, "rank 2 on host-b (127.0.0.1): no such file"),
        (1, "crash", 1, "rank 1 on host-a (127.0.0.1): RuntimeError: a bug"),
        (3, "exit", 143, None),
    ],
)
def test_an_error_of_one_ends_all_with_its_words_once_a_machine_and_its_code(ranks, failing, order, code, message):
    group = ranks.meet("aabb", constants={"ERROR_GRACE_SECONDS": 1.0})
    group[failing].tell(order)
    assert [rank.code() for rank in group] == [code] * 4
    said = errors_of(group)
    if order == "crash":  # it alone knows where
        assert said[failing].startswith("Traceback")
        assert said[failing].endswith("RuntimeError: a bug\nof two lines")
        said[failing] = ""
    assert said == ([f"error: {message}", "", f"error: {message}", ""] if message else [""] * 4)


@pytest.mark.parametrize("why", ["silence", "paused"])
def test_who_cannot_say_why_ends_nevertheless(ranks, why):
    group = ranks.meet("aab", constants={"ERROR_GRACE_SECONDS": 1.0})
    group[0].tell(why)
    assert group[0].answer() == "silent"
    group[1].kill()
    assert [rank.code() for rank in (group[0], group[2])] == [LOST, LOST]
    assert "rank 1 on host-a" in group[2].said()


def test_nobody_leaves_before_all_have_come_to_the_end(ranks):
    group = ranks.meet("abc")
    group[0].tell("leave")
    group[2].tell("leave")
    group[1].kill()
    assert [rank.code() for rank in (group[0], group[2])] == [LOST, LOST]


@pytest.mark.parametrize("first", [0, 2])
def test_after_the_end_each_may_go_when_it_likes(ranks, first):
    group = ranks.meet("abc")
    leave(group)
    group[first].kill()
    group[first].code()
    for rank in group:
        if rank is not group[first]:
            rank.tell("end")
            assert rank.code() == 0
    assert errors_of(group) == [""] * 3


# --- meeting ---


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1"])
def test_processes_without_torchrun_meet_at_rank_0(ranks, address):
    if address == "::1" and address not in {a.address for all in psutil.net_if_addrs().values() for a in all}:
        pytest.skip("no IPv6 on this machine")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    group = ranks.meet("abc", MASTER_ADDR=address, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    group[2].tell("refuse")
    assert [rank.code() for rank in group] == [2] * 3


def test_a_single_process_of_torchrun_watches_nobody(ranks):
    (alone,) = ranks.meet("a")
    alone.tell("refuse")
    assert alone.code() == 2
    assert alone.said() == "error: no such file\n"


def test_torchruns_own_restarts_are_refused(ranks):
    (again,) = ranks.start("ab", only=[0], TORCHELASTIC_RESTART_COUNT="1")
    assert again.code() == 2
    assert "./launch.sh --max-restarts" in again.said()


def test_strangers_do_not_become_ranks_and_hold_nobody_up(ranks):
    began = time.monotonic()
    group = ranks.meet("abc", function=meet_among_strangers)
    assert time.monotonic() - began < rendezvous.CONNECT_TIMEOUT_SECONDS
    group[1].kill()
    assert [rank.code() for rank in (group[0], group[2])] == [LOST, LOST]


def test_a_rank_that_does_not_come_is_named(ranks):
    here = ranks.start("aabb", only=[0, 2], constants={"RENDEZVOUS_TIMEOUT_SECONDS": 1.0})
    assert [rank.code() for rank in here] == [2, 2]
    for rank in here:
        assert rank.said() == (
            f"error: rendezvous at 127.0.0.1:{ranks.store.port} failed: rank 1, 3 of 4 processes did not join within "
            "1 s\nRun the command on every machine, with the same number of processes.\n"
        )


def test_a_rank_says_whom_it_waits_for_and_where_once_a_machine(ranks):
    here = ranks.start(
        "aab", only=[0, 1], constants={"RENDEZVOUS_TIMEOUT_SECONDS": 3.0, "STATUS_INTERVAL_SECONDS": 1.0}
    )
    assert [rank.code() for rank in here] == [2, 2]
    line = rf"waiting for rank 2 of 3 processes at MASTER_ADDR:MASTER_PORT 127.0.0.1:{ranks.store.port} \(2 s"
    assert re.match(line, here[0].said())
    assert here[1].said() == ""  # the first of its machine speaks


@pytest.mark.parametrize("taken", [False, True], ids=["nobody answers", "a busy port"])
def test_a_place_where_no_one_can_meet_is_named(ranks, taken):
    with socket.create_server(("0.0.0.0", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        if not taken:
            server.close()
        (rank,) = ranks.start(
            "ab", only=[0 if taken else 1],
            constants={"RENDEZVOUS_TIMEOUT_SECONDS": 2.0, "STATUS_INTERVAL_SECONDS": 1.0},
            MASTER_PORT=place.partition(":")[2], TORCHELASTIC_USE_AGENT_STORE="False",
        )  # fmt: skip
        assert rank.code() == 2
    said = rank.said().splitlines()
    assert place in said[-1] and said[-1].startswith("error: ")
    if taken:
        assert said[-1].endswith("set another MASTER_PORT for all processes")
    else:
        assert re.match(
            f"rank 1 is waiting for rank 0 \\(Connection refused\\) at MASTER_ADDR:MASTER_PORT {place}", said[0]
        )


def test_a_rank_that_is_lost_on_the_way_is_named(ranks):
    group = ranks.start("abc", function=die_before_the_line, constants={"CONNECT_TIMEOUT_SECONDS": 1.0})
    assert [rank.code() for rank in group] == [2, LOST, 9]
    assert group[0].said() == "error: rank 2 on host-c (127.0.0.1) did not connect within 1 s\n"
    assert "rank 0 on host-a (127.0.0.1) was lost" in group[1].said()


def test_a_signal_ends_the_wait_for_the_others(ranks):
    (alone,) = ranks.start("ab", only=[0], function=heed_signals)
    ranks.store.wait(["isotrain/address/0"], timedelta(seconds=60))
    os.kill(alone.pid, signal.SIGTERM)
    assert alone.code() == 128 + signal.SIGTERM


def test_processes_of_different_settings_refuse_to_work_together(ranks):
    group = [*ranks.start("aab", only=[0, 1]), *ranks.start("aab", only=[2], SEED="2")]
    assert [rank.code() for rank in group] == [2] * 3
    error = (
        "error: the processes differ in the seed: 1 on host-a (127.0.0.1) (rank 0), 2 on host-b (127.0.0.1) (rank 2)"
    )
    assert errors_of(group) == [error, "", error]


def test_hosts_that_cannot_reach_each_other_are_named(ranks):
    group = ranks.start("aab", function=announce_a_closed_port)
    assert [rank.code() for rank in group] == [2] * 3
    error = (
        "error: host-a (127.0.0.1) cannot reach host-b (127.0.0.1): Connection refused\n"
        "Open all ports of the firewall between them. MASTER_ADDR must be in the network that they share."
    )
    assert errors_of(group) == [error, "", error]


def test_a_first_collective_that_fails_says_which_setting_helps(ranks):
    group = ranks.start("ab", constants={"ERROR_GRACE_SECONDS": 1.0}, GLOO_SOCKET_IFNAME="no-such-interface")
    assert [rank.code() for rank in group] == [2, 2]
    for rank in group:
        assert "the first all-reduce failed: " in rank.said()
        assert rank.said().endswith("GLOO_SOCKET_IFNAME on CPUs\n")


def test_the_interface_of_an_address():
    loopback = [name for name, all in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in all)]
    assert [rendezvous._find_interface("127.0.0.1")] == loopback
    with pytest.raises(ValueError, match=r"no network interface has the address 192\.0\.2\.1"):
        rendezvous._find_interface("192.0.2.1")


@pytest.mark.parametrize(
    ("ways", "address"),
    [
        ({"head": "10.0.0.1"}, "10.0.0.1"),
        ({"head": "127.0.0.1", "10.0.0.2": "10.0.0.1"}, "10.0.0.1"),  # /etc/hosts: 127.0.1.1 head
    ],
)
def test_the_host_of_the_rendezvous_gives_the_address_that_others_reach(monkeypatch, ways, address):
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setattr(rendezvous, "_find_source_address", lambda host, port: ways[host])
    store = HashStore()
    for key, value in (("address/1", '"10.0.0.2"'), ("address/1/read", "")):
        store.set(key, value)
    assert rendezvous._find_own_address(store, 0, 2) == address


def test_a_way_to_this_host_begins_at_its_own_address():
    assert rendezvous._find_source_address("127.0.1.1", 1) == "127.0.0.1"


# --- signals ---


@pytest.fixture
def handlers():
    """Puts the handlers of signals back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_counted_over_ranks_and_named(handlers, number):
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
def test_before_the_training_a_signal_ends_the_program(handlers, number):
    StopRequest().listen()
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(number)
    assert ended.value.code == 128 + number


def test_what_nohup_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopRequest().listen()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL


def test_a_thread_hears_no_signals_and_works(handlers):
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
    unlaunched.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast_bf16)
    unlaunched.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
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
    unlaunched.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert choose_precision("auto") == "bf16"
    with pytest.raises(UserError, match="fp16 on a CPU"):
        choose_precision("fp16")


@pytest.mark.parametrize(
    ("planned", "cuda", "visible", "told", "message"),
    [
        (None, False, None, "", "nvidia-smi lists 2 GPUs that torch .* cannot use: .*\n.* ./launch.sh --topology cpu"),
        ("cuda", False, "0,1", "", "nvidia-smi lists 2 GPUs"),
        ("cuda", False, None, "true", "launch.sh planned for cuda \\(ISOTRAIN_DEVICE\\), but torch found cpu"),
        ("cuda", False, "", "false", "launch.sh planned for cuda \\(ISOTRAIN_DEVICE\\), but torch found cpu"),
        ("cpu", True, None, "false", "launch.sh planned for cpu \\(ISOTRAIN_DEVICE\\), but torch found cuda"),
        (None, False, "", "", None),
        (None, False, "-1", "", None),
        (None, False, None, "yes", None),
        ("cpu", False, None, "true", None),
        ("cuda", True, None, "false", None),
    ],
)
def test_the_device_is_the_one_that_was_planned(unlaunched, tmp_path, planned, cuda, visible, told, message):
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


def test_another_number_of_processes_than_asked_for_is_refused(unlaunched):
    unlaunched.setenv("ISOTRAIN_NUM_PROCESSES", "2")
    with pytest.raises(UserError, match=r"2 processes were requested \(ISOTRAIN_NUM_PROCESSES\), but 1 started"):
        start_accelerator("no")
