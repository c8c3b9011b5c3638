"""The processes of a run: how they meet, what they must have in common, and how they stop together.

Always holds: no process waits for one that is gone. Rank 0 and every other rank are joined by a line, a TCP connection
over which both ends show that they live. A process that dies closes its line, so all know at once; one whose network is
cut falls silent, and `SILENCE` seconds later all know that too. An error on any rank stops all ranks, with its message.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from torch.distributed import PrefixStore, rendezvous

from trainer.config import UserError

SILENCE = 20.0
"""seconds without a sign of life after which a process counts as lost; the signs come five times as often"""
GATHERING = 300.0
"""seconds the processes wait for one another at the start"""
CONNECTING = 10.0
"""seconds in which a host of the same network answers"""
HEARSAY = 3.0
"""seconds in which a process learns that an error of its own was another's fault"""
COLLECTIVE = timedelta(minutes=30)
"""a collective may take so long: the others may be tokenising; a lost process is noticed sooner"""


def choose_precision(wanted: str) -> str:
    """Turns `run.precision` into no, bf16 or fp16, on the device that accelerate will choose.

    accelerate's own "no" is its default and cannot be told from a choice, so `auto` overrides it.

    Raises:
        UserError: fp16 on a CPU.
    """
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true"}
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if wanted == "auto" and launched in {"bf16", "fp16"}:
        wanted = launched
    if wanted == "auto" and on_cpu:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        wanted = "bf16" if fast else "no"
    elif wanted == "auto":
        wanted = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if wanted == "fp16" and on_cpu:
        raise UserError("run.precision: fp16 on a CPU is dozens of times slower than fp32; use bf16, no or auto")
    return wanted


def start_accelerator(precision: str, folder: Path | None = None, backends: Sequence[str] = ()) -> Accelerator:
    """Joins the processes that the launcher started.

    Args:
        precision: no, bf16 or fp16.
        folder: run folder, for the trackers.
        backends: names of Accelerate's trackers.

    Raises:
        UserError: an unknown tracker, or another number of processes than was asked for.
    """
    place = ProjectConfiguration(project_dir=str(folder.parent), logging_dir=str(folder.parent)) if folder else None
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            # without a GPU, accelerate would otherwise leave several processes unaware of one another
            cpu=not torch.cuda.is_available(),
            log_with=list(backends) or None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE)],
            project_config=place,
        )
    except ValueError as error:
        raise UserError(f"accelerate: {' '.join(str(error).split())[:240]}") from None
    asked = int(os.environ.get("ISOTRAIN_NUM_PROCESSES") or os.environ.get("WORLD_SIZE") or 1)
    if asked != accelerator.num_processes:
        raise UserError(
            f"{asked} processes were asked for, {accelerator.num_processes} came up; see ./launch.sh --dry-run"
        )
    return accelerator


@contextlib.contextmanager
def together(
    precision: str, facts: Mapping[str, str], folder: Path | None = None, backends: Sequence[str] = ()
) -> Iterator[tuple[Accelerator, Watch]]:
    """Everything that several processes do together happens inside; alone, it is `start_accelerator`.

    Args:
        precision: no, bf16 or fp16.
        facts: what must be equal on all processes, by name.
        folder: see `start_accelerator`.
        backends: see `start_accelerator`.

    Raises:
        UserError: the processes do not come up, cannot reach one another, or differ in the facts.
        SystemExit: an error that was told to all processes.
    """
    watch = Watch()
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            watch.begin(*_meet({"device": device, "precision": precision, "torch": torch.__version__, **facts}))
        with _first_collective(watch) if watch.watching else contextlib.nullcontext():
            accelerator = start_accelerator(precision, folder, backends)
            total = accelerator.reduce(torch.ones((), device=accelerator.device), "sum")
            assert int(total) == accelerator.num_processes
        yield accelerator, watch
        watch.end()
    except (UserError, OSError) as error:
        watch.stop_all(str(error), 2)
        raise
    except (SystemExit, KeyboardInterrupt) as leaving:
        watch.stop_all("", int(leaving.code or 0) if isinstance(leaving, SystemExit) else 130)
        raise
    except Exception as error:
        if watch.watching:
            time.sleep(HEARSAY)  # a collective fails because of another rank; if so, the watch ends this process now
            traceback.print_exc()
            watch.stop_all(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", 1)
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def agree(accelerator: Accelerator, facts: Mapping[str, str]) -> None:
    """Makes sure that all processes have the same facts.

    Raises:
        UserError: on all of them, names the first fact that differs and where.
    """
    own = (socket.gethostname(), dict(facts))
    everyone = [own] * accelerator.num_processes
    if accelerator.num_processes > 1:
        torch.distributed.all_gather_object(everyone, own)
    _compare([theirs for _, theirs in everyone], [host for host, _ in everyone])


class Watch:
    """This process's ends of the lines: all of them on rank 0, one on every other rank, none where it is alone.

    Rank 0 passes on what it hears. A process that learns of a reason to stop leaves through `os._exit`, for its main
    thread may wait in a collective that never returns; checkpoints are whole at any moment.
    """

    def __init__(self) -> None:
        self.position = "the start"
        """where the main thread is, for messages"""
        self._rank = 0
        self._hosts: list[str] = []
        self._store: Any = None
        self._lines: dict[int, socket.socket] = {}
        self._listeners: list[threading.Thread] = []
        self._sending, self._stopping = threading.Lock(), threading.Lock()
        self._ended = threading.Event()

    @property
    def watching(self) -> bool:
        """Whether there are others."""
        return bool(self._lines)

    def begin(self, rank: int, hosts: list[str], lines: dict[int, socket.socket], store: Any) -> None:
        """Watches the ranks at the other ends of `lines`; `hosts` names the host of every rank.

        The store of the rendezvous is kept, for it may live in this process and the process group meets there too.
        """
        self._rank, self._hosts, self._lines, self._store = rank, hosts, lines, store
        self._listeners = [threading.Thread(target=self._listen, args=(other,), daemon=True) for other in lines]
        for thread in (*self._listeners, threading.Thread(target=self._show_life, daemon=True)):
            thread.start()

    def end(self) -> None:
        """Waits until all processes have come here; from then on one may go without the others."""
        if self._rank:
            self._ended.set()
            self._send({"end": True})
        for thread in self._listeners:  # each hears the end of the other side, or ends this process
            thread.join()
        if self._rank == 0:
            self._ended.set()
            self._send({"end": True})

    def stop_all(self, message: str, code: int) -> None:
        """Ends all processes with an error of this one; returns only where there are no others."""
        if not self.watching:
            return
        reason = {"rank": self._rank, "message": message, "code": code}
        if self._rank == 0:
            self._leave(reason)
        self._send(reason)
        time.sleep(HEARSAY)  # rank 0 sends back what all are to say, and `_listen` ends this process
        self._leave(reason)

    def _listen(self, other: int) -> None:
        try:
            with self._lines[other].makefile("rb") as messages:
                for message in messages:
                    reason = json.loads(message)
                    if "end" in reason:
                        return
                    if reason:
                        self._leave(reason)
            lost = "its process has ended"
        except TimeoutError:
            lost = f"no sign of life for {SILENCE:.0f} s; it has stopped, or the network is cut"
        except (OSError, ValueError):
            lost = "its process has ended"
        self._leave({"rank": other, "lost": lost, "code": os.EX_TEMPFAIL})

    def _show_life(self) -> None:
        while not self._ended.wait(SILENCE / 5):
            self._send({})

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._sending:
            for line in self._lines.values():
                with contextlib.suppress(OSError):  # who listens at the other end learns of it by reading
                    line.sendall(data)

    def _leave(self, reason: dict[str, Any]) -> None:
        """Passes the reason on, says it once a machine, ends this process. The first reason counts."""
        self._stopping.acquire()  # never released: nothing comes after it
        try:
            if self._rank == 0:
                self._send(reason)
            self._say(reason)
        finally:  # also where nobody reads what is said
            os._exit(reason["code"])

    def _say(self, reason: dict[str, Any]) -> None:
        rank, lost, message = reason["rank"], reason.get("lost"), reason.get("message")
        where = f"rank {rank} on {self._hosts[rank]}"
        if lost:
            message = (
                f"{where} was lost in {self.position}: {lost}\n"
                "What was saved is whole; the same command continues the run."
            )
        elif rank:
            message = message and f"{where}: {message}"
        here = [other for other, host in enumerate(self._hosts) if host == self._hosts[self._rank]]
        if lost and rank != self._rank and rank in here:  # a lost process says nothing; one that only slept does
            here.remove(rank)
        if message and self._rank == here[0]:
            print(f"\nerror: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()


class StopRequest:
    """What SIGTERM and SIGINT leave behind: the number of the signal, looked at between steps.

    Before the training (`deferred` is False) there is nothing to save: a signal ends the program at once. So does a
    second Ctrl-C, more than a second after the first.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.deferred = False
        self._received = 0.0

    def listen(self) -> None:
        """Takes over both signals."""
        signal.signal(signal.SIGTERM, self._receive)
        signal.signal(signal.SIGINT, self._receive)

    def counts(self) -> list[int]:
        """[1, 0] for SIGTERM, [0, 1] for SIGINT, else zeros: can be summed over ranks."""
        return [int(self.signal == signal.SIGTERM), int(self.signal == signal.SIGINT)]

    def _receive(self, number: int, frame: Any) -> None:
        if not self.deferred:
            raise SystemExit(128 + number)
        # launchers pass a signal on, so that one Ctrl-C may arrive twice within a moment
        if self.signal and number == signal.SIGINT and time.monotonic() - self._received > 1:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        self._received = time.monotonic()


def _meet(facts: dict[str, str]) -> tuple[int, list[str], dict[int, socket.socket], Any]:
    """Finds the other processes; returns this one's rank, the host of every rank, the lines, and the store.

    Raises:
        UserError: some do not come, cannot reach one another, or differ in the facts.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # the store still has the addresses of those before
        raise UserError(
            "torchrun cannot start these processes again; instead of its restarts: ./launch.sh --max-restarts N"
        )
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=GATHERING)))
        store = PrefixStore("isotrain", store)
        address = _own_address(store, rank, world_size)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(address))
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family, backlog=world_size + 1) as listener:
            token = secrets.token_hex(16)
            card = {"host": f"{socket.gethostname()} ({address})", "facts": facts, "token": token}
            cards = _exchange(store, "card", rank, world_size, {**card, "at": listener.getsockname()[:2]})
            hosts = [other["host"] for other in cards]
            _compare([other["facts"] for other in cards], hosts)
            _check_routes(store, rank, cards)
            if rank == 0:
                return rank, hosts, _accept_lines(listener, token, hosts), store
        line = socket.create_connection(cards[0]["at"], timeout=CONNECTING)
        line.sendall(f"{cards[0]['token']}{rank:08d}".encode())
        line.settimeout(SILENCE)
        return rank, hosts, {0: line}, store
    except (OSError, RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"no meeting at {place}: {str(error).partition(chr(10))[0]}") from None


def _exchange(store: Any, what: str, rank: int, world_size: int, own: Any) -> list[Any]:
    """What every rank says, in their order."""
    keys = [f"{what}/{other}" for other in range(world_size)]
    store.set(keys[rank], json.dumps(own))
    if not _all_there(store, keys, GATHERING):
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        raise UserError(
            f"of {world_size} processes, rank {', '.join(map(str, missing[:8]))} did not come up within "
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
    for key in keys:
        while not store.check([key]):
            if time.monotonic() > deadline:
                return False
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


@contextlib.contextmanager
def _first_collective(watch: Watch) -> Iterator[None]:
    """The process group comes up inside, on ways that are not those of our lines: NCCL and gloo choose them themselves.

    Raises:
        UserError: it fails.
    """
    watch.position = "the first all-reduce"
    hint = "name the network that joins the machines: NCCL_SOCKET_IFNAME on GPUs, GLOO_SOCKET_IFNAME on CPUs"
    late = threading.Timer(GATHERING, watch.stop_all, [f"the first all-reduce does not end; {hint}", 2])
    late.start()
    try:
        yield
    except RuntimeError as error:
        time.sleep(HEARSAY)  # as in `together`
        raise UserError(f"the first all-reduce failed: {str(error).partition(chr(10))[0]}\n{hint}") from None
    finally:
        late.cancel()


def _compare(facts: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> None:
    for rank, own in enumerate(facts):
        for name, value in facts[0].items():
            if own.get(name) != value:
                raise UserError(
                    f"the processes differ in {name}: {value} on {hosts[0]} (rank 0), "
                    f"{own.get(name)} on {hosts[rank]} (rank {rank})"
                )
