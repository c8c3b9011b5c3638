"""Calls a function on several gloo ranks of this machine, each rank a process of its own."""

import time
import traceback
from multiprocessing.connection import wait

from tests.harness.processes import free_port, rank_environment, start_process

TIMEOUT = 200


def call_on_ranks(world_size, function, *arguments):
    """What `function(*arguments)` returns on each rank.

    Raises:
        AssertionError: a rank failed or did not answer; has its traceback.
    """
    port, ranks = free_port(), []
    try:
        for rank in range(world_size):
            environment = rank_environment(rank, world_size, port) if world_size > 1 else {}
            environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
            ranks.append(start_process(_call, world_size, function, arguments, environment=environment))
        return _answers([rank.end for rank in ranks])
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _answers(ends):
    """What each rank sends, as it comes: where one fails, the others would wait for it in vain."""
    values, latest = {}, time.monotonic() + TIMEOUT
    while len(values) < len(ends):
        waiting = [end for rank, end in enumerate(ends) if rank not in values]
        ready = wait(waiting, latest - time.monotonic())
        assert ready, f"no answer within {TIMEOUT} s from {len(waiting)} of {len(ends)} ranks"
        for end in ready:
            try:
                failure, value = end.recv()
            except EOFError:
                failure, value = "died without a word", None
            assert failure is None, f"rank {ends.index(end)}: {failure}"
            values[ends.index(end)] = value
    return [values[rank] for rank in range(len(ends))]


def _call(end, world_size, function, arguments):
    import torch

    try:
        end.send((None, function(*arguments)))
        if world_size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except BaseException:
        end.send((traceback.format_exc(), None))
    return 0
