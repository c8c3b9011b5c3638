"""Ranks that join like those of a run and then follow the orders of a test, each in its own process.

Their host names are invented, so that ranks of several machines run on this one.
"""

import contextlib
import json
import os
from datetime import timedelta

from torch.distributed import TCPStore

from tests.harness.processes import TIMEOUT, start_process


class Ranks:
    """The ranks of one run, on hosts named by letters: `start("aab")` is two on a, one on b."""

    def __init__(self):
        self._started = []
        # as the first machine's agent of torchrun keeps it
        self.store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=TIMEOUT), wait_for_workers=False)

    def start(self, hosts, only=None, function=None, constants=None, **environment):
        """Starts `function` (obey) on each rank, or on `only` some, with constants of rendezvous or watch replaced."""
        ranks = []
        for rank in range(len(hosts)) if only is None else only:
            variables = {
                "RANK": str(rank), "LOCAL_RANK": str(hosts[:rank].count(hosts[rank])), "WORLD_SIZE": str(len(hosts)),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                "CUDA_VISIBLE_DEVICES": "", **environment,
            }  # fmt: skip
            host = f"host-{hosts[rank]}"
            ranks.append(start_process(_live, constants or {}, function or obey, environment=variables, host=host))
            self._started.append(ranks[-1])
        return ranks

    def meet(self, hosts, **settings):
        """Starts the ranks and waits until they have met."""
        ranks = self.start(hosts, **settings)
        for rank in ranks:
            assert rank.answer() == "here"
        return ranks

    def answer_for(self, rank, host=None, address=None):
        """Answers in the rendezvous for a rank that listens at `address`, or only says where its host is.

        Returns rank 0's card, which has the address that the ranks connect to.
        """
        self._publish("address", rank, "127.0.0.1")
        card = json.loads(self.store.get("isotrain/card/0"))
        if address:
            self._publish("card", rank, {**card, "host": f"{host} (127.0.0.1)", "address": address})
            self._publish("routes", rank, [])
        return card

    def _publish(self, topic, rank, value):
        self.store.set(f"isotrain/{topic}/{rank}", json.dumps(value))
        self.store.set(f"isotrain/{topic}/{rank}/read", "")

    def kill(self):
        for rank in self._started:
            rank.kill()
            rank.wait()


def errors_of(ranks):
    """What was said about errors, by rank; "" for those that said nothing."""
    return [rank.said().strip() for rank in ranks]


def leave(ranks):
    for rank in ranks:
        rank.tell("leave")
    for rank in ranks:
        assert rank.answer() == "left"


def _live(end, constants, function):
    from trainer.distributed import rendezvous, watch
    from trainer.errors import main_guard

    for name, value in constants.items():
        (module,) = (module for module in (rendezvous, watch) if hasattr(module, name))
        setattr(module, name, value)
    return main_guard(lambda: function(end))


def obey(end):
    """Meets the others, then does what it is told, in step 7."""
    from trainer.distributed.session import join_processes
    from trainer.errors import UserError

    with join_processes("no", {"the seed": os.environ.get("SEED", "1")}) as (_, watch):
        watch.position = "step 7"
        end.send("here")
        match end.recv():
            case "refuse":
                raise UserError("no such file")
            case "crash":
                raise RuntimeError("a bug\nof two lines")
            case "exit":
                raise SystemExit(143)
            case "silence":  # as where stderr was piped to a program that has ended
                read, write = os.pipe()
                os.dup2(write, 2)
                os.close(read)
                end.send("silent")
                end.recv()
            case "paused":  # as where stderr is piped to a pager that waits for a key
                read, write = os.pipe()
                os.set_blocking(write, False)
                with contextlib.suppress(BlockingIOError):
                    while os.write(write, bytes(4096)):
                        pass
                os.set_blocking(write, True)
                os.dup2(write, 2)
                end.send("silent")
                end.recv()
    end.send("left")
    end.recv()


def handle_signals(end):
    from trainer.distributed.session import StopRequest

    StopRequest().listen()
    obey(end)
