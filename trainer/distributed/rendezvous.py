"""How the processes of a run find one another: the rendezvous of the launcher, and a line from each rank to rank 0.

Always holds: before anything is computed every pair of hosts is known to reach each other, and all ranks agree on what
they are about to do; who does not come, cannot be reached, or differs, is named, on every rank.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psutil
from torch.distributed import PrefixStore, TCPStore

from trainer.errors import UserError, speaks_for_its_machine

SILENCE = 20.0
"""seconds without a sign of life after which a process counts as lost; the signs come five times as often"""
GATHERING = 300.0
"""seconds the processes wait for one another at the start"""
TELLING = 10.0
"""seconds between two lines about who is waited for"""
CONNECTING = 10.0
"""seconds in which a host of the same network answers"""


def meet(facts: dict[str, str]) -> tuple[int, list[str], dict[int, socket.socket], Any]:
    """Finds the other processes; returns this one's rank, the host of every rank, the lines, and the store.

    Raises:
        UserError: some do not come, cannot reach one another, or differ in the facts.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # the store still has the addresses of those before
        raise UserError(
            "torchrun cannot start these processes again; instead of its restarts: ./launch.sh --max-restarts N"
        )
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = PrefixStore("isotrain", _reach_store(rank, world_size))
        address = _own_address(store, rank, world_size)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(address))
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family, backlog=world_size + 1) as listener:
            token = secrets.token_hex(16)
            card = {"host": f"{socket.gethostname()} ({address})", "facts": facts, "token": token}
            cards = _exchange(store, "card", rank, world_size, {**card, "at": listener.getsockname()[:2]})
            hosts = [other["host"] for other in cards]
            compare([other["facts"] for other in cards], hosts)
            _check_routes(store, rank, cards)
            if rank == 0:
                return rank, hosts, _accept_lines(listener, token, hosts), store
        line = socket.create_connection(cards[0]["at"], timeout=CONNECTING)
        line.sendall(f"{cards[0]['token']}{rank:08d}".encode())
        line.settimeout(SILENCE)
        return rank, hosts, {0: line}, store
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        if "EADDRINUSE" in reason:
            reason = "the port is in use by another program on this machine; set another MASTER_PORT for all processes"
        raise UserError(f"rendezvous at {_place()} failed: {reason}") from None


def _place() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _reach_store(rank: int, world_size: int) -> TCPStore:
    """The store of the rendezvous; rank 0 keeps it where torchrun does not.

    As torch's own env:// does, but says whom it waits for, and hears signals meanwhile.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    if not keeps_it:
        _wait_for_rank_0(address, port, rank)
    patience = timedelta(seconds=GATHERING)
    return TCPStore(address, port, world_size, keeps_it, patience, wait_for_workers=False, multi_tenant=keeps_it)


def _wait_for_rank_0(address: str, port: int, rank: int) -> None:
    deadline, tell_at = time.monotonic() + GATHERING, time.monotonic() + TELLING
    while True:
        try:
            return socket.create_connection((address, port), timeout=CONNECTING).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise
            if time.monotonic() > tell_at:
                tell_at += TELLING
                _tell(f"rank {rank} waits for rank 0 ({error.strerror or error})", deadline)
        time.sleep(0.2)


def _tell(text: str, deadline: float) -> None:
    if speaks_for_its_machine():
        left = max(0.0, deadline - time.monotonic())
        print(f"{text} at MASTER_ADDR:MASTER_PORT {_place()} ({left:.0f} s left)", file=sys.stderr, flush=True)


def _exchange(store: Any, what: str, rank: int, world_size: int, own: Any) -> list[Any]:
    """What every rank says, in their order."""
    keys = [f"{what}/{other}" for other in range(world_size)]
    store.set(keys[rank], json.dumps(own))
    if not _all_there(store, keys, GATHERING):
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        raise UserError(
            f"of {world_size} processes, rank {', '.join(map(str, missing[:8]))} did not come to {_place()} within "
            f"{GATHERING:.0f} s; was the command started on every machine, with the same number of them?"
        )
    said = [json.loads(text) for text in store.multi_get(keys)]
    store.set(f"{keys[rank]} has read", "")
    if rank == 0:  # the store may live in this process, and leave with it
        _all_there(store, [f"{key} has read" for key in keys], CONNECTING)
    return said


def _all_there(store: Any, keys: list[str], seconds: float) -> bool:
    """Whether all keys are set in time. `store.wait` would be deaf to signals meanwhile."""
    deadline = time.monotonic() + seconds
    tell_at = time.monotonic() + TELLING
    for key in keys:
        while not store.check([key]):
            if time.monotonic() > deadline:
                return False
            if time.monotonic() > tell_at:
                tell_at += TELLING
                missing = [str(rank) for rank, other in enumerate(keys) if not store.check([other])]
                _tell(f"waiting for rank {', '.join(missing[:8])} of {len(keys)} processes, which meet", deadline)
            time.sleep(0.05)
    return True


def _own_address(store: Any, rank: int, world_size: int) -> str:
    """The address under which the other hosts see this one: that of its way to the rendezvous.

    The host of the rendezvous may know its own name as loopback; its address is that of its way to another host.
    """
    master = _way_to(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    addresses = _exchange(store, "address", rank, world_size, master)
    abroad = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
    return _way_to(abroad[0], 1) if abroad and addresses[rank] not in abroad else addresses[rank]


def _way_to(host: str, port: int) -> str:
    """This host's own address on its way to another."""
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])


def _interface(address: str) -> str:
    """The network interface of an address. gloo, left alone, takes what the host's name resolves to: often loopback."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    raise ValueError(f"no network interface has the address {address}")


def _check_routes(store: Any, rank: int, cards: list[Any]) -> None:
    """Every host connects to every other one.

    Raises:
        UserError: on all ranks, names the pairs that cannot.
    """
    hosts = [other["host"] for other in cards]
    firsts = [hosts.index(host) for host in dict.fromkeys(hosts)]

    def connect(other: int) -> str | None:
        try:
            socket.create_connection(cards[other]["at"], timeout=CONNECTING).close()
        except OSError as error:
            return f"{hosts[rank]} cannot reach {hosts[other]}: {error.strerror or error}"
        return None

    failures = []
    if rank in firsts and len(firsts) > 1:
        with ThreadPoolExecutor(32) as pool:
            failures = [found for found in pool.map(connect, [r for r in firsts if r != rank]) if found]
    failures = [found for others in _exchange(store, "routes", rank, len(cards), failures) for found in others]
    if failures:
        more = f" (and {len(failures) - 3} more pairs)" if len(failures) > 3 else ""
        raise UserError(
            f"{'; '.join(failures[:3])}{more}\n"
            "Open the firewall between them for all ports; MASTER_ADDR must be in the network they share."
        )


def _accept_lines(listener: socket.socket, token: str, hosts: list[str]) -> dict[int, socket.socket]:
    """The line of every other rank. Others may connect too: a host that tries its route, a stranger that says nothing.

    Raises:
        UserError: names the ranks that do not come.
    """
    lines: dict[int, socket.socket] = {}
    deadline = time.monotonic() + CONNECTING  # less than SILENCE: rank 0 shows no life before all are here
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(lines) < len(hosts) - 1:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = next(rank for rank in range(1, len(hosts)) if rank not in lines)
                raise UserError(f"rank {missing} on {hosts[missing]} did not connect within {CONNECTING:.0f} s")
            for key, _ in ready:
                if key.fileobj is listener:
                    selector.register(listener.accept()[0], selectors.EVENT_READ)
                    continue
                line: Any = selector.unregister(key.fileobj).fileobj
                hello = ""
                with contextlib.suppress(OSError):
                    hello = line.recv(len(token) + 8).decode(errors="replace")
                if hello.startswith(token):
                    line.settimeout(SILENCE)
                    lines[int(hello[len(token) :])] = line
                else:
                    line.close()
    return lines


def compare(facts: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> None:
    """Makes sure that all ranks have the same facts.

    Raises:
        UserError: names the first fact that differs, and where.
    """
    for rank, own in enumerate(facts):
        for name, value in facts[0].items():
            if own.get(name) != value:
                raise UserError(
                    f"the processes differ in {name}: {value} on {hosts[0]} (rank 0), "
                    f"{own.get(name)} on {hosts[rank]} (rank {rank})"
                )
