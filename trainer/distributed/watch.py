"""Heartbeats between the ranks: which rank was lost, where, and how all ranks stop with the same message.

No rank waits for one that is gone. Rank 0 holds a TCP connection to every other rank, and both ends send heartbeats. A
dead process closes its connection, so all ranks know at once. If the network fails, all know after
`HEARTBEAT_TIMEOUT_SECONDS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from typing import Any

from trainer.distributed.rendezvous import Group
from trainer.errors import visible

HEARTBEAT_TIMEOUT_SECONDS = 20.0
"""a rank without a heartbeat for this long is lost; heartbeats are five times as frequent"""
ERROR_GRACE_SECONDS = 3.0
"""how long a failed rank waits for the message of another rank that may have caused the failure"""


class Watch:
    """This rank's connections: to all ranks on rank 0, to rank 0 on the others, none in a single process.

    Rank 0 forwards messages. To stop, a rank calls `os._exit`, because its main thread may wait forever in a
    collective. Checkpoints on disk are complete at any moment.
    """

    def __init__(self) -> None:
        self.position = "the start"
        """what the main thread does, for messages"""
        self._group = Group(0, [], {}, None)
        self._listeners: list[threading.Thread] = []
        self._sending, self._stopping = threading.Lock(), threading.Lock()
        self._ended = threading.Event()

    @property
    def is_active(self) -> bool:
        """Whether there are other ranks."""
        return bool(self._group.connections)

    def begin(self, group: Group) -> None:
        """Starts the heartbeats. Keeps the group's store alive, which the process group of torch also uses."""
        self._group = group
        for connection in group.connections.values():
            connection.settimeout(HEARTBEAT_TIMEOUT_SECONDS)
        self._listeners = [threading.Thread(target=self._listen, args=(o,), daemon=True) for o in group.connections]
        for thread in (*self._listeners, threading.Thread(target=self._send_heartbeats, daemon=True)):
            thread.start()

    def share_from_rank_0(self, name: str, own: str) -> str:
        """Returns rank 0's value of `own` on all ranks."""
        if self._group.rank == 0:
            self._group.store.set(name, own)
        return str(self._group.store.get(name).decode())

    def end(self) -> None:
        """Waits until all ranks call this. Afterwards a rank may exit before the others."""
        if self._group.rank:
            self._ended.set()
            self._send({"end": True})
        for thread in self._listeners:  # ends with the other side, or ends this process
            thread.join()
        if self._group.rank == 0:
            self._ended.set()
            self._send({"end": True})

    def wait_for_cause(self) -> None:
        """After an error, gives another rank time to report its cause, which ends this process."""
        if self.is_active:
            time.sleep(ERROR_GRACE_SECONDS)

    def stop_all(self, message: str, code: int) -> None:
        """Stops all ranks because of an error on this one. Returns only in a single process."""
        if not self.is_active:
            return
        reason = {"rank": self._group.rank, "message": message, "code": code}
        if self._group.rank:
            self._send(reason)
            self.wait_for_cause()  # rank 0 replies with the message for all
        self._leave(reason)

    def _listen(self, other: int) -> None:
        lost = "its process has ended"
        try:
            if self._read_until_end(other):
                return
        except TimeoutError:
            lost = f"no heartbeat for {HEARTBEAT_TIMEOUT_SECONDS:.0f} s; the process is stopped or the network is down"
        except (OSError, ValueError):
            pass
        self._leave({"rank": other, "lost": lost, "code": os.EX_TEMPFAIL})

    def _read_until_end(self, other: int) -> bool:
        """Reads messages until the other rank ends the session; returns False if its connection closes first."""
        with self._group.connections[other].makefile("rb") as messages:
            for message in messages:
                reason = json.loads(message)
                if "end" in reason:
                    return True
                if reason:
                    self._leave(reason)
        return False

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(HEARTBEAT_TIMEOUT_SECONDS / 5):
            self._send({})

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._sending:
            for connection in self._group.connections.values():
                with contextlib.suppress(OSError):  # `_listen` notices a broken connection
                    connection.sendall(data)

    def _leave(self, reason: dict[str, Any]) -> None:
        """Forwards the reason, prints it once per machine and ends this process. Only the first reason counts."""
        self._stopping.acquire()  # never released, because the process ends
        threading.Timer(ERROR_GRACE_SECONDS, os._exit, [reason["code"]]).start()  # stderr may block
        try:
            if self._group.rank == 0:
                self._send(reason)
            self._print(reason)
        finally:  # also if stderr is closed
            os._exit(reason["code"])

    def _print(self, reason: dict[str, Any]) -> None:
        rank, lost, message = reason["rank"], reason.get("lost"), reason.get("message")
        hosts, own = self._group.hosts, self._group.rank
        where = f"rank {rank} on {hosts[rank]}"
        if lost:
            message = (
                f"{where} was lost in {self.position}: {lost}\n"
                "Files on disk are complete. Run the same command again to resume."
            )
        elif rank:
            message = message and f"{where}: {message}"
        here = [other for other, host in enumerate(hosts) if host == hosts[own]]
        if lost and rank != own and rank in here:  # the lost rank cannot print
            here.remove(rank)
        if message and own == here[0]:
            print(f"\nerror: {visible(message)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
