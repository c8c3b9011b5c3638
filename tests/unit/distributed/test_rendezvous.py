"""Ranks find each other, or say which rank or host is at fault."""

import os
import re
import signal
import socket
from datetime import timedelta

import psutil
import pytest

from tests.unit.distributed.ranks import (
    errors_of,
    handle_signals,
)

LOST = os.EX_TEMPFAIL


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1"])
def test_without_torchrun_ranks_join_at_rank_0(ranks, address):
    if address == "::1" and address not in {a.address for all in psutil.net_if_addrs().values() for a in all}:
        pytest.skip("no IPv6 on this machine")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    group = ranks.meet("abc", MASTER_ADDR=address, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    group[2].tell("refuse")
    assert [rank.code() for rank in group] == [2] * 3


def test_a_single_process_of_torchrun_joins_no_one(ranks):
    (alone,) = ranks.meet("a")
    alone.tell("refuse")
    assert alone.code() == 2
    assert alone.said() == "error: no such file\n"


def test_restarts_by_torchrun_are_refused(ranks):
    (again,) = ranks.start("ab", only=[0], TORCHELASTIC_RESTART_COUNT="1")
    assert again.code() == 2
    assert "./launch.sh --max-restarts" in again.said()


def test_foreign_connections_are_ignored(ranks):
    """Before rank 1 connects to rank 0, three others do: one is silent, one talks, one hangs up."""
    group = ranks.start("abc", only=[0, 2])
    address = ranks.answer_for(1)["address"]
    silent, talking, hasty = (socket.create_connection(address) for _ in range(3))
    talking.sendall(b"GET / HTTP/1.1\r\nHost: isotrain\r\n\r\n")
    hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    hasty.close()
    with silent, talking:
        group += ranks.start("abc", only=[1])
        assert [rank.answer() for rank in group] == ["here"] * 3


def test_a_missing_rank_is_named(ranks):
    here = ranks.start("aabb", only=[0, 2], constants={"RENDEZVOUS_TIMEOUT_SECONDS": 1.0})
    assert [rank.code() for rank in here] == [LOST, LOST]
    for rank in here:
        assert rank.said() == (
            f"error: rendezvous at 127.0.0.1:{ranks.store.port} failed: rank 1, 3 of 4 processes did not join within "
            "1 s\nRun the command on every machine, with the same number of processes.\n"
        )


def test_a_waiting_rank_reports_who_is_missing_once_per_machine(ranks):
    here = ranks.start(
        "aab", only=[0, 1], constants={"RENDEZVOUS_TIMEOUT_SECONDS": 3.0, "STATUS_INTERVAL_SECONDS": 1.0}
    )
    assert [rank.code() for rank in here] == [LOST, LOST]
    line = rf"waiting for rank 2 of 3 processes at MASTER_ADDR:MASTER_PORT 127.0.0.1:{ranks.store.port} \(2 s"
    assert re.match(line, here[0].said())
    assert here[1].said() == ""  # the first of its machine speaks


@pytest.mark.parametrize("taken", [False, True], ids=["nobody answers", "a busy port"])
def test_a_failed_rendezvous_names_its_address(ranks, taken):
    with socket.create_server(("0.0.0.0", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        if not taken:
            server.close()
        (rank,) = ranks.start(
            "ab", only=[0 if taken else 1],
            constants={"RENDEZVOUS_TIMEOUT_SECONDS": 2.0, "STATUS_INTERVAL_SECONDS": 1.0},
            MASTER_PORT=place.partition(":")[2], TORCHELASTIC_USE_AGENT_STORE="False",
        )  # fmt: skip
        assert rank.code() == (2 if taken else LOST)
    said = rank.said().splitlines()
    assert place in said[-1] and said[-1].startswith("error: ")
    if taken:
        assert said[-1].endswith("set another MASTER_PORT for all processes")
    else:
        assert re.match(f"waiting for rank 0 \\(Connection refused\\) at MASTER_ADDR:MASTER_PORT {place}", said[0])


def test_a_rank_that_does_not_connect_is_named(ranks):
    group = ranks.start("abc", only=[0, 1], constants={"CONNECT_TIMEOUT_SECONDS": 1.0})
    with socket.create_server(("127.0.0.1", 0)) as server:
        ranks.answer_for(2, "host-c", server.getsockname())
        assert [rank.code() for rank in group] == [LOST, LOST]
    assert group[0].said() == "error: rank 2 on host-c (127.0.0.1) did not connect within 1 s\n"
    assert "rank 0 on host-a (127.0.0.1) was lost" in group[1].said()


def test_a_signal_interrupts_the_rendezvous(ranks):
    (alone,) = ranks.start("ab", only=[0], function=handle_signals)
    ranks.store.wait(["isotrain/address/0"], timedelta(seconds=60))
    os.kill(alone.pid, signal.SIGTERM)
    assert alone.code() == 128 + signal.SIGTERM


def test_ranks_with_different_settings_are_refused(ranks):
    group = [*ranks.start("aab", only=[0, 1]), *ranks.start("aab", only=[2], SEED="2")]
    assert [rank.code() for rank in group] == [2] * 3
    error = (
        "error: the processes differ in the seed: 1 on host-a (127.0.0.1) (rank 0), 2 on host-b (127.0.0.1) (rank 2)"
    )
    assert errors_of(group) == [error, "", error]


def test_hosts_that_cannot_reach_each_other_are_named(ranks):
    group = ranks.start("aab", only=[0, 1])
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = closed.getsockname()
    ranks.answer_for(2, "host-b", nowhere)
    assert [rank.code() for rank in group] == [2, 2]
    error = (
        "error: host-a (127.0.0.1) cannot reach host-b (127.0.0.1): Connection refused\n"
        "Open all ports of the firewall between them. MASTER_ADDR must be in the network that they share."
    )
    assert errors_of(group) == [error, ""]
