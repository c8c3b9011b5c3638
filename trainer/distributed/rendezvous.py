"""How the ranks of a run find each other: through the launcher's TCP store, then one connection per rank to rank 0.

When `join_ranks` returns, all hosts can reach each other and all ranks have the same settings. If it fails, every rank
gets a message that names the rank or host at fault.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
from torch.distributed import PrefixStore, TCPStore

from trainer.errors import LostError, UserError, is_first_on_machine

RENDEZVOUS_TIMEOUT_SECONDS = 300.0  # how long the ranks wait for each other at the start
STATUS_INTERVAL_SECONDS = 10.0  # how often a waiting rank says what it waits for
CONNECT_TIMEOUT_SECONDS = 10.0
"""how long a connection within the network may take; less than the heartbeat timeout, as rank 0 sends none meanwhile"""
RANK_DIGITS = 8
HELLO_TIMEOUT_SECONDS = 2.0  # how long a new connection may take to name its rank


@dataclass(frozen=True)
class Group:
    """All ranks of a run, seen from one of them."""

    rank: int
    hosts: list[str]
    """name and address of each rank's host"""
    connections: dict[int, socket.socket]
    """by rank: on rank 0 to all others, on the others to rank 0"""
    store: Any
    """the TCP store of the rendezvous"""


def join_ranks(facts: dict[str, str]) -> Group:
    """Finds the other ranks and connects to them. All must have the same `facts`."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # the store still holds the previous addresses
        raise UserError("restarts by torchrun are not supported; use ./launch.sh --max-restarts N")
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = PrefixStore("isotrain", _open_store(rank, world_size))
        address = _find_own_address(store, rank, world_size)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _find_interface(address))
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family, backlog=world_size + 1) as listener:
            token = secrets.token_hex(16)
            card = {"host": f"{socket.gethostname()} ({address})", "facts": facts, "token": token}
            cards = _exchange(store, "card", rank, world_size, {**card, "address": listener.getsockname()[:2]})
            hosts = [other["host"] for other in cards]
            check_equal([other["facts"] for other in cards], hosts)
            _check_routes(store, rank, cards)
            if rank == 0:
                return Group(rank, hosts, _accept_ranks(listener, token, hosts), store)
        connection = socket.create_connection(cards[0]["address"], timeout=CONNECT_TIMEOUT_SECONDS)
        connection.sendall(f"{cards[0]['token']}{rank:0{RANK_DIGITS}}".encode())
        return Group(rank, hosts, {0: connection}, store)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        if "EADDRINUSE" in reason:
            reason = "another program on this machine uses the port; set another MASTER_PORT for all processes"
            raise UserError(_failure(reason)) from None
        is_mistake = isinstance(error, (ValueError, socket.gaierror))
        raise (UserError if is_mistake else LostError)(_failure(reason)) from None  # rank 0 may have been lost


def check_equal(facts: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> None:
    """Checks that all ranks have the same facts; names the first one that differs, and where."""
    for rank, own in enumerate(facts):
        for name, value in facts[0].items():
            if own.get(name) != value:
                raise UserError(
                    f"the processes differ in {name}: {value} on {hosts[0]} (rank 0), "
                    f"{own.get(name)} on {hosts[rank]} (rank {rank})"
                )


def _failure(reason: str) -> str:
    return f"rendezvous at {_endpoint()} failed: {reason}"


def _endpoint() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _open_store(rank: int, world_size: int) -> TCPStore:
    """Connects to the store of the rendezvous. Rank 0 serves it, unless torchrun does.

    Like env:// of torch, but reports what it waits for and reacts to signals.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)

    def find_missing() -> str:
        try:
            socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_SECONDS).close()
        except OSError as error:
            return f"rank 0 ({error.strerror or error})"
        return ""

    if not is_server and (missing := _wait_for(find_missing, RENDEZVOUS_TIMEOUT_SECONDS)):
        raise LostError(_failure(f"no connection to {missing}"))
    timeout = timedelta(seconds=RENDEZVOUS_TIMEOUT_SECONDS)
    return TCPStore(address, port, world_size, is_server, timeout, wait_for_workers=False, multi_tenant=is_server)


def _wait_for(find_missing: Callable[[], str], seconds: float) -> str:
    """Polls until nothing is missing, and reports from time to time. Returns what is missing after `seconds`."""
    start, report_at = time.monotonic(), STATUS_INTERVAL_SECONDS
    while missing := find_missing():
        elapsed = time.monotonic() - start
        if elapsed > seconds:
            break
        if elapsed > report_at and is_first_on_machine():
            left = f"({seconds - elapsed:.0f} s left)"
            print(f"waiting for {missing} at MASTER_ADDR:MASTER_PORT {_endpoint()} {left}", file=sys.stderr, flush=True)
            report_at += STATUS_INTERVAL_SECONDS
        time.sleep(0.05)
    return missing


def _exchange(store: Any, topic: str, rank: int, world_size: int, own: Any) -> list[Any]:
    """Shares a value with all ranks; returns the values of all, by rank."""
    keys = [f"{topic}/{other}" for other in range(world_size)]
    store.set(keys[rank], json.dumps(own))
    if not _wait_for_keys(store, keys, RENDEZVOUS_TIMEOUT_SECONDS):
        missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        reason = f"rank {', '.join(missing[:8])} of {world_size} processes did not join"
        hint = "Run the command on every machine, with the same number of processes."
        raise LostError(_failure(f"{reason} within {RENDEZVOUS_TIMEOUT_SECONDS:.0f} s\n{hint}"))
    values = [json.loads(text) for text in store.multi_get(keys)]
    store.set(f"{keys[rank]}/read", "")
    if rank == 0:  # rank 0 may serve the store, which ends with it
        _wait_for_keys(store, [f"{key}/read" for key in keys], CONNECT_TIMEOUT_SECONDS)
    return values


def _wait_for_keys(store: Any, keys: list[str], seconds: float) -> bool:
    """Waits for all keys; returns False after `seconds`. Unlike `store.wait`, it reacts to signals."""
    pending = list(keys)

    def find_missing() -> str:
        while pending and store.check([pending[0]]):
            pending.pop(0)
        return f"rank {keys.index(pending[0])} of {len(keys)} processes" if pending else ""

    return not _wait_for(find_missing, seconds)


def _find_own_address(store: Any, rank: int, world_size: int) -> str:
    """Finds the address at which other hosts reach this one: the source address of its route to the rendezvous.

    The host of the rendezvous may resolve its own name to loopback, so it takes the route to another host instead.
    """
    own = _find_source_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    addresses = _exchange(store, "address", rank, world_size, own)
    remote = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
    return _find_source_address(remote[0], 1) if remote and own not in remote else own


def _find_source_address(host: str, port: int) -> str:
    """Finds this host's own address on the route to another host."""
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])


def _find_interface(address: str) -> str:
    """Finds the network interface of an address. By default gloo resolves the host name, which is often loopback."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    raise ValueError(f"no network interface has the address {address}")


def _check_routes(store: Any, rank: int, cards: list[Any]) -> None:
    """Checks that all hosts can connect to each other; names the pairs that cannot, on all ranks."""
    hosts = [other["host"] for other in cards]
    first_ranks = [hosts.index(host) for host in dict.fromkeys(hosts)]

    def connect(other: int) -> str | None:
        try:
            socket.create_connection(cards[other]["address"], timeout=CONNECT_TIMEOUT_SECONDS).close()
        except OSError as error:
            return f"{hosts[rank]} cannot reach {hosts[other]}: {error.strerror or error}"
        return None

    failures = []
    if rank in first_ranks and len(first_ranks) > 1:
        with ThreadPoolExecutor(32) as pool:
            failures = [failure for failure in pool.map(connect, [r for r in first_ranks if r != rank]) if failure]
    failures = [failure for found in _exchange(store, "routes", rank, len(cards), failures) for failure in found]
    if failures:
        more = f" (and {len(failures) - 3} more pairs)" if len(failures) > 3 else ""
        raise UserError(
            f"{'; '.join(failures[:3])}{more}\n"
            "Open all ports of the firewall between them. MASTER_ADDR must be in the network that they share."
        )


def _accept_ranks(listener: socket.socket, token: str, hosts: list[str]) -> dict[int, socket.socket]:
    """Accepts the connection of every other rank. Closes others, such as those of `_check_routes`."""
    connections: dict[int, socket.socket] = {}
    deadline = time.monotonic() + CONNECT_TIMEOUT_SECONDS
    while len(connections) < len(hosts) - 1:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            missing = next(rank for rank in range(1, len(hosts)) if rank not in connections)
            waited = f"within {CONNECT_TIMEOUT_SECONDS:.0f} s"
            raise LostError(f"rank {missing} on {hosts[missing]} did not connect {waited}") from None
        connection.settimeout(HELLO_TIMEOUT_SECONDS)
        hello = ""
        with contextlib.suppress(OSError):
            hello = connection.recv(len(token) + RANK_DIGITS).decode(errors="replace")
        if hello.startswith(token):
            connections[int(hello.removeprefix(token))] = connection
        else:
            connection.close()
    return connections
