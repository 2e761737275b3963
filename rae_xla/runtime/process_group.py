"""The processes of a run: how they find each other, and the text they exchange.

There is one ``torch.distributed`` process group for each run, whose CPU part is gloo. Both backends
use it; a run of one process has none.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rae_xla.errors import ConnectionLostError, UserError
from rae_xla.runtime.waiting import (
    exchange_notice,
    name_processes,
    wait_for_all,
    waiting_notice,
)

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the slowest one, which may be downloading weights or compiling."""

DEFAULT_PORT = 12354
"""Port of process 0 if ``MASTER_PORT`` is not set; torch_xla's own rendezvous uses 12355."""


_LEAVING = 5.0
"""Seconds that ``leave`` waits for exchanges that have not ended."""


class ProcessLostError(ConnectionLostError):
    """Another process of the run ended or does not answer; the run can be started again."""


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that torchrun started, one for each device.

    Attributes:
        index: number of the process, from 0.
        count: number of processes, over all hosts.
        local_index: number of the process on its host, from 0; also the number of its device.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read torchrun's environment variables; without them, this is the only process.

    Raises:
        UserError: there are several processes, and a variable is missing or not a number.
    """
    count = environment.get("WORLD_SIZE", "1")
    if count == "1":
        return Launch()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not environment.get(name)]
    wrong = [name for name in names[:3] if not environment.get(name, "0").isdigit()]
    if missing or wrong:
        problem = f"{missing[0]} is not set" if missing else f"{wrong[0]} is not a number"
        raise UserError(
            f"WORLD_SIZE is {count}, so this is one of several processes, but {problem}: start the "
            "run with torchrun, which sets all the variables, or unset WORLD_SIZE"
        )
    rank, size, local = (int(environment[name]) for name in names[:3])
    return Launch(rank, size, local)


def join_torchrun(device: torch.device, timeout: timedelta = TIMEOUT) -> None:
    """Join the processes that torchrun started.

    Gloo carries tensors on CPUs, and the default library of the accelerator (NCCL for CUDA) those
    on its devices.

    Raises:
        UserError: the processes do not find each other in time.
    """
    backend = "gloo"
    if device.type != "cpu":
        backend += f",{device.type}:{dist.get_default_backend_for_device(device)}"
        backend = f"cpu:{backend}"
    launch = read_launch()
    index, count = launch.index, launch.count
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    not_found = (
        f"the processes of this run did not find each other at {address} ({{}}): check that "
        "torchrun was started on every host with the same --rdzv-endpoint and --nnodes"
    )
    advice = (
        "start the run with torchrun on every host; if there is to be one process only, unset RANK "
        "and WORLD_SIZE"
    )
    try:
        with _finding_process_0(index, count, address, advice):
            store = _torchrun_store(launch, timeout)
        if missing := wait_for_all(store, index, count, timeout, advice):
            reason = f"process {index} of {count} did not find {name_processes(missing)}"
            raise UserError(not_found.format(reason))
        dist.init_process_group(backend, store=store, rank=index, world_size=count, timeout=timeout)
    except dist.DistError as error:
        raise UserError(not_found.format(_reason(error))) from error


def _torchrun_store(launch: Launch, timeout: timedelta) -> dist.Store:
    """Return the store of a torchrun launch; process 0 serves it, unless torchrun itself does."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store: dist.Store = next(dist.rendezvous("env://", timeout=timeout))[0]
        return store
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        launch.count,
        is_master=launch.index == 0,
        timeout=timeout,
        wait_for_workers=False,  # ``wait_for_all`` waits, and logs for which ones
        multi_tenant=True,
    )


def _finding_process_0(
    index: int, count: int, address: str, advice: str
) -> AbstractContextManager[None]:
    """Return a context in which process ``index`` connects to process 0, and logs that it waits."""
    return waiting_notice(
        lambda: f"process {index} of {count} waits for process 0 at {address}: {advice}"
    )


def join_hosts(
    index: int, count: int, address: str = "localhost", timeout: timedelta = TIMEOUT
) -> None:
    """Join the processes of a run that torchrun did not start, one on each host.

    Does nothing for a single process. Process 0 listens on the port after ``MASTER_PORT``, so that
    ``MASTER_PORT`` itself stays free for others.

    Args:
        index: number of this process, from 0.
        count: number of processes.
        address: host of process 0; ``MASTER_ADDR`` overrides it.
        timeout: how long to wait for the others, here and in every exchange.

    Raises:
        UserError: the processes do not find each other in time, or the port is invalid or taken.
        ProcessLostError: a process that was found ended before all had found each other.
    """
    if count == 1:
        return
    address, port = os.environ.get("MASTER_ADDR") or address, _port()
    others = "process 0" if index else f"the {count - 1} other processes"
    advice = (
        "check that the run was started once on every host, that MASTER_ADDR (if set) is the "
        "address of process 0, and that the port is free there and open between the hosts"
    )
    not_found = (
        f"process {index} of {count} did not find {{}} at {address}:{port} within "
        f"{timeout.total_seconds():.0f} s ({{}}): {advice}"
    )
    try:
        with _finding_process_0(index, count, f"{address}:{port}", advice):
            store = dist.TCPStore(
                address,
                port,
                count,
                is_master=index == 0,
                timeout=timeout,
                wait_for_workers=index != 0,  # process 0 waits below, and logs for which ones
            )
    except (dist.DistError, RuntimeError) as error:
        raise UserError(not_found.format(others, _reason(error))) from error
    began = time.monotonic()
    try:
        if missing := wait_for_all(store, index, count, timeout, advice):
            raise UserError(not_found.format(name_processes(missing), "it was not started"))
        dist.init_process_group("gloo", store=store, rank=index, world_size=count, timeout=timeout)
        dist.barrier()
    except (dist.DistError, RuntimeError) as error:
        if time.monotonic() - began < timeout.total_seconds():  # a connection was closed
            raise ProcessLostError(_lost(index, count, error)) from error
        raise UserError(not_found.format(others, _reason(error))) from error


def _port() -> int:
    named = os.environ.get("MASTER_PORT")
    if not named:
        return DEFAULT_PORT
    if not named.isdigit():
        raise UserError(f"MASTER_PORT is {named!r}; it must be the number of a port")
    return int(named) + 1


def _reason(error: BaseException) -> str:
    """The first line of an error of torch.distributed, without the C++ stack trace."""
    return str(error).strip().partition("\n")[0]


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Turn the errors that torch raises when a peer ends or stops answering into one message.

    Raises:
        ProcessLostError: a collective operation inside the context failed.
    """
    try:
        yield
    except RuntimeError as error:
        lost = _lost(dist.get_rank(), dist.get_world_size(), error)
        raise ProcessLostError(lost) from error


def _lost(index: int, count: int, error: BaseException) -> str:
    return (
        f"process {index} of {count} lost the connection to another process ({_reason(error)}): "
        "look for the first error in the logs of the other hosts, and start the run again on all "
        "of them"
    )


def all_gather_text(text: str) -> list[str]:
    """Return the ``text`` of every process, in the order of the processes.

    Every process must call it. A single process gets its own text back. It is one gloo collective
    rather than keys of the store, which would cost a round trip each: on two busy cores, 1.3 ms
    for two processes, where 64 gets took 46 ms (and one ``multi_get``, once all keys are set, 0.3).

    Raises:
        ProcessLostError: another process ended, or did not call it in time.
    """
    if not dist.is_initialized():
        return [text]
    texts: list[Any] = [None] * dist.get_world_size()
    with lost_processes_named(), exchange_notice():
        dist.all_gather_object(texts, text)
    return texts


def new_gloo_group(timeout: timedelta = TIMEOUT) -> dist.ProcessGroup | None:
    """Create another gloo group of all processes; None for a single process.

    Every process must call it. Threads that communicate while training does need a group of their
    own, because the operations of a group are matched by their order.

    Raises:
        ProcessLostError: another process ended, or did not call it in time.
    """
    if not dist.is_initialized():
        return None
    with lost_processes_named():
        return dist.new_group(backend="gloo", timeout=timeout)


def leave() -> None:
    """Destroy the process groups; call it before the interpreter exits.

    The threads of gloo would outlive the interpreter otherwise. One of them that frees the last
    reference to a tensor then aborts the process, although everything before has succeeded. An
    exchange of another thread that never ends is given up after five seconds.
    """
    if dist.is_initialized():
        thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
        thread.start()
        thread.join(_LEAVING)
