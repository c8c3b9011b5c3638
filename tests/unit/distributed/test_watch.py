"""A rank that dies, stops or fails: all ranks stop with one message per machine."""

import os
import signal
from multiprocessing.connection import wait

import pytest

from tests.unit.distributed.ranks import errors_of, leave

LOST = os.EX_TEMPFAIL


@pytest.mark.parametrize(("lost", "speakers"), [(0, (1, 2)), (2, (0, 3)), (3, (0, 2))])
def test_a_dead_rank_is_noticed_at_once_and_named_once_per_machine(ranks, lost, speakers):
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
def test_a_rank_without_heartbeat_is_lost_and_exits_when_it_wakes(ranks, stopped):
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


def test_a_waiting_rank_is_not_lost(ranks):
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
def test_an_error_on_one_rank_stops_all_with_its_message_and_exit_code(ranks, failing, order, code, message):
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
def test_a_rank_that_cannot_print_exits_anyway(ranks, why):
    group = ranks.meet("aab", constants={"ERROR_GRACE_SECONDS": 1.0})
    group[0].tell(why)
    assert group[0].answer() == "silent"
    group[1].kill()
    assert [rank.code() for rank in (group[0], group[2])] == [LOST, LOST]
    assert "rank 1 on host-a" in group[2].said()


def test_no_rank_exits_before_all_reach_the_end(ranks):
    group = ranks.meet("abc")
    group[0].tell("leave")
    group[2].tell("leave")
    group[1].kill()
    assert [rank.code() for rank in (group[0], group[2])] == [LOST, LOST]


@pytest.mark.parametrize("first", [0, 2])
def test_after_the_end_each_rank_may_exit_alone(ranks, first):
    group = ranks.meet("abc")
    leave(group)
    group[first].kill()
    group[first].code()
    for rank in group:
        if rank is not group[first]:
            rank.tell("end")
            assert rank.code() == 0
    assert errors_of(group) == [""] * 3
