"""A run on two hosts: the adapter of one process, a network that is cut, a firewall. The hosts are network namespaces.

The runs share two cores and wait for seconds when the network is gone, so each starts as early as it can: a fixture
starts a run, a test waits for it.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.harness.data import topic_rows, write_csv
from tests.harness.processes import ROOT
from trainer.training.checkpoint import load_newest

ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
PORT = "29500"
NOBODY = "02:00:00:00:00:99"
STEPS = 40
# enters a host as its init would have left it: its own name, and names for the two
ENTER = 'echo "$0" >/proc/sys/kernel/hostname; mount --bind "$1" /etc/hosts; shift; exec "$@"'
numbers = itertools.count()

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "mount"))),
    reason="hosts are network namespaces: needs root, ip (iproute2), unshare and mount",
)


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20).stdout


class Launched:
    """Processes that were started together: how they ended, when, and what they said on stderr."""

    def __init__(self, processes, errors):
        self.processes, self._errors = processes, errors

    def codes(self, seconds=150):
        latest = time.monotonic() + seconds
        return [process.wait(max(0, latest - time.monotonic())) for process in self.processes]

    def said(self):
        return [path.read_text() for path in self._errors]


class Hosts:
    """host-a and host-b, joined by a cable; `folder` has a home for each."""

    def __init__(self, folder: Path):
        self.folder = folder
        number = next(numbers)
        self.names = {host: f"isotrain-{os.getpid()}-{number}-{host}" for host in ADDRESSES}
        self._running = []

    def connect(self):
        try:
            for name in self.names.values():
                ip("netns", "add", name)
            ends = self.names["a"], "type", "veth", "peer", "name", "eth0", "netns", self.names["b"]
            ip("link", "add", "eth0", "netns", *ends)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for host, address in ADDRESSES.items():
            self.ip(host, "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                self.ip(host, "link", "set", link, "up")
            (self.folder / host).mkdir()
            # as Debian's installer writes it: a host's own name is a loopback address
            own = {"a": ADDRESSES["a"], "b": ADDRESSES["b"], host: "127.0.1.1"}
            lines = ["127.0.0.1 localhost", *(f"{own[other]} host-{other}" for other in ADDRESSES)]
            (self.folder / f"hosts-of-{host}").write_text("\n".join(lines) + "\n")

    def ip(self, host, *arguments):
        return ip("-n", self.names[host], *arguments)

    def cut(self):
        """From now on all packets vanish, and neither host is told: they go to a network card that does not exist."""
        self._neighbours("replace", "lladdr", NOBODY, "nud", "permanent")

    def mend(self):
        self._neighbours("del")

    def _neighbours(self, verb, *more):
        for host, other in (("a", "b"), ("b", "a")):
            self.ip(host, "neigh", verb, ADDRESSES[other], "dev", "eth0", *more)

    def put_a_firewall_before(self, host):
        """Drops what goes to and from other ports than that of the rendezvous."""
        nowhere = "10.77.0.99"
        self.ip(host, "neigh", "replace", nowhere, "lladdr", NOBODY, "nud", "permanent", "dev", "eth0")
        self.ip(host, "route", "add", "10.77.0.0/24", "via", nowhere, "dev", "eth0", "table", "99")
        self.ip(host, "rule", "add", "pref", "200", "to", "10.77.0.0/24", "lookup", "99")
        for end in ("sport", "dport"):
            self.ip(host, "rule", "add", "pref", "100", "to", "10.77.0.0/24", end, PORT, "lookup", "main")

    def start(self, host, *command, **environment):
        """Starts a command in the home of a host."""
        entering = ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "sh", "-c", ENTER, f"host-{host}"]
        errors = self.folder / f"errors-{len(self._running)}"
        process = subprocess.Popen(
            [*entering, self.folder / f"hosts-of-{host}", *map(str, command)],
            cwd=self.folder / host,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
            stdout=subprocess.DEVNULL,
            stderr=errors.open("w"),
        )
        self._running.append(process)
        return process, errors

    def launch(self, arguments):
        """launch.sh on both, as a user types it."""
        node = {"NNODES": "2", "MASTER_ADDR": "host-a", "MASTER_PORT": PORT, "ISOTRAIN_PYTHON": sys.executable}
        command = [ROOT / "launch.sh", "--topology", "multi_node", "--processes", "1", *arguments]
        return self.start_both(lambda rank: (command, {"NODE_RANK": str(rank), **node}))

    def start_both(self, by_rank):
        started = []
        for rank, host in enumerate(ADDRESSES):
            command, environment = by_rank(rank)
            started.append(self.start(host, *command, **environment))
        return Launched(*zip(*started, strict=True))

    @property
    def run(self):
        """The folder of the run: rank 0's."""
        return self.folder / "a/runs/tiny"

    def remove(self):
        for name in self.names.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                subprocess.run(["kill", "-KILL", *ip("netns", "pids", name).split()], capture_output=True)
                ip("netns", "del", name)
        for process in self._running:
            process.wait(20)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Makes pairs of hosts, each pair with a network of its own."""
    with contextlib.ExitStack() as stack:

        def make():
            pair = Hosts(tmp_path_factory.mktemp("hosts"))
            stack.callback(pair.remove)
            pair.connect()
            return pair

        yield make


@pytest.fixture(scope="module")
def arguments(tiny_backbone, tmp_path_factory):
    """A run long enough that it can be caught in the middle; dropout on, several micro-batches a step."""
    data = tmp_path_factory.mktemp("data")
    train, test = write_csv(data / "train.csv", topic_rows(61, seed=1)), write_csv(data / "test.csv", topic_rows(23))
    (data / "recipe.yaml").write_text("data:\n  max_length: 48\n")
    return [
        "--recipe", data / "recipe.yaml",  # without one, launch.sh takes the quickstart's
        "--model.name", tiny_backbone, "--data.train", train, "--data.test", test,
        "--batch.size", "8", "--batch.max_tokens", "100", "--peft.r", "4", "--peft.lora_dropout", "0.1",
        "--peft.target_modules", "[query,value]", "--optim.learning_rate", "1e-3", "--optim.max_steps", STEPS,
        "--run.name", "tiny", "--run.precision", "no", "--checkpoint.every_steps", "4",
        "--evaluation.every_steps", "20",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cut(hosts, arguments):
    """A run whose network was cut in the middle, and when that was."""
    pair = hosts()
    launched = pair.launch(arguments)
    while not list(pair.run.glob("checkpoints/step-*")):
        assert [process.poll() for process in launched.processes] == [None, None], launched.said()
        time.sleep(0.02)
    pair.cut()
    return pair, launched, time.monotonic()


@pytest.fixture(scope="module")
def alone(cut, hosts, arguments):
    """The same run, of one process."""
    pair = hosts()
    process, errors = pair.start("a", sys.executable, ROOT / "trainer/run.py", *arguments)
    return pair, Launched([process], [errors])


@pytest.fixture(scope="module")
def whole(cut, hosts, arguments):
    """The same run on two hosts whose network stays."""
    pair = hosts()
    return pair, pair.launch(arguments)


@pytest.fixture(scope="module")
def continued(cut, arguments):
    """The run that was cut, when both sides have stopped and the network is there again."""
    pair, launched, _ = cut
    launched.codes()
    pair.mend()
    return pair, pair.launch(arguments)


@pytest.fixture(scope="module")
def parted(cut, hosts):
    """Two processes that meet over a firewall between the hosts; the beginning of a run, without what takes long."""
    pair = hosts()
    try:
        pair.put_a_firewall_before("b")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no routes by port here: {error.stderr.strip()}")
    script = pair.folder / "meet.py"
    script.write_text(
        "from trainer.errors import main_guard\n"
        "from trainer.distributed.session import join_processes\n"
        "raise SystemExit(main_guard(lambda: join_processes('no', {}).__enter__()))\n"
    )
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "host-a", "MASTER_PORT": PORT, "PYTHONPATH": str(ROOT)}
    return pair.start_both(lambda rank: ([sys.executable, script], {"RANK": str(rank), **group}))


def adapter_of(pair):
    return load_file(pair.run / "adapter/adapter_model.safetensors")


def test_both_sides_of_a_cut_network_stop(cut, alone, whole, parted):
    pair, launched, since = cut
    assert launched.codes() == [os.EX_TEMPFAIL] * 2, launched.said()
    assert time.monotonic() - since < 60
    for said, peer in zip(
        launched.said(), ("rank 1 on host-b (10.77.0.2)", "rank 0 on host-a (10.77.0.1)"), strict=True
    ):
        assert re.search(rf"^error: {re.escape(peer)} was lost in .*step \d+: no heartbeat for 20 s", said, re.M), said
        assert "Traceback" not in said
    checkpoint, damage = load_newest(pair.run / "checkpoints")
    assert damage == []
    assert 4 <= checkpoint.step < STEPS


def test_two_hosts_give_the_adapter_of_one_process(alone, whole, continued):
    for _, launched in (alone, whole):
        assert set(launched.codes()) == {0}, launched.said()
    one, two = adapter_of(alone[0]), adapter_of(whole[0])
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)


def test_the_same_command_continues_to_the_adapter_of_an_uninterrupted_run(whole, continued):
    pair, launched = continued
    assert launched.codes() == [0, 0], launched.said()
    assert json.loads((pair.run / "summary.json").read_text())["resumed_from"][0] >= 4
    adapter, uninterrupted = adapter_of(pair), adapter_of(whole[0])
    assert adapter.keys() == uninterrupted.keys()
    assert all(torch.equal(adapter[name], uninterrupted[name]) for name in adapter)


def test_hosts_with_a_firewall_between_them_are_named_before_anything_starts(parted):
    assert parted.codes(seconds=60) == [2, 2], parted.said()
    for said in parted.said():
        assert "host-a (10.77.0.1) cannot reach host-b (10.77.0.2): timed out" in said
        assert "host-b (10.77.0.2) cannot reach host-a (10.77.0.1): timed out" in said
