"""Words between the processes of a run, before its devices have anything to say to each other."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import DistError, TCPStore

from rae_xla.errors import UserError

PORT = 12354
"""Beside MASTER_PORT's default, so that a process group may use that one."""

PATIENCE = timedelta(minutes=10)
"""How long hosts may start one after another."""


def _port() -> int:
    named = os.environ.get("MASTER_PORT")
    if not named:
        return PORT
    if not named.isdigit():
        raise UserError(f"MASTER_PORT is {named!r}; it must be the number of a port")
    return int(named) + 1


class Hosts:
    """Texts passed among processes, through a small server in process 0.

    Args:
        process_index: this process, from 0.
        process_count: how many there are.
        address: where process 0 runs, unless ``MASTER_ADDR`` says it.
        patience: how long to wait for the others.
    """

    def __init__(
        self,
        process_index: int,
        process_count: int,
        address: str = "localhost",
        patience: timedelta = PATIENCE,
    ) -> None:
        self._index, self._count = process_index, process_count
        self._address = os.environ.get("MASTER_ADDR") or address
        self._port = _port()
        self._patience = patience
        self._store: TCPStore | None = None
        self._round = 0

    def exchange(self, text: str) -> list[str]:
        """Every process's ``text``, by process; each must call it equally often.

        Raises:
            UserError: some process does not come.
        """
        if self._count == 1:
            return [text]
        self._round += 1
        texts: list[str] = []
        try:
            store = self._connected()
            store.set(f"{self._round}/{self._index}", text)
            for i in range(self._count):
                texts.append(store.get(f"{self._round}/{i}").decode())
            self._let_all_read(store)
            self._forget_round_before(store)
        except DistError as error:
            missing = f"process {len(texts)}" if self._store is not None else "process 0"
            if self._index == 0 and self._store is None:
                missing = f"{self._count - 1} other processes"
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"process {self._index} of {self._count}: no word from {missing} at "
                f"{self._address}:{self._port} ({reason}; up to "
                f"{self._patience.total_seconds():.0f} s were given): see that the run was started "
                "on every host and nowhere twice, that MASTER_ADDR (if set) is process 0's, and "
                "that the port is free there and open between them"
            ) from error
        return texts

    def new_group(self) -> dist.ProcessGroup | None:
        """A gloo group of the processes; each must ask for it. None for a process that is alone."""
        if self._count == 1:
            return None
        if not dist.is_initialized():
            store = dist.PrefixStore("group", self._connected())
            dist.init_process_group("gloo", store=store, rank=self._index, world_size=self._count)
        return dist.new_group(backend="gloo")

    def _forget_round_before(self, store: TCPStore) -> None:
        """Whoever speaks in this round has read the one before: its texts need no more room."""
        before = self._round - 1
        store.delete_key(f"{before}/{self._index}")
        if self._index == 0:
            store.delete_key(f"{before}/read")

    def _connected(self) -> TCPStore:
        if self._store is None:
            self._store = TCPStore(
                self._address, self._port, self._count, self._index == 0, self._patience
            )
        return self._store

    def _let_all_read(self, store: TCPStore) -> None:
        """Process 0 must not end, and its server with it, before the others have read."""
        store.add(f"{self._round}/read", 1)
        until = time.monotonic() + self._patience.total_seconds()
        while self._index == 0 and store.add(f"{self._round}/read", 0) < self._count:
            if time.monotonic() > until:
                return
            time.sleep(0.01)
