"""Captured functions: traced once, then replayed as compiled programs.

torch_xla traces a function in Python whenever it is called and caches only its compilation. Tracing
one train step of a deep model takes longer than a TPU needs to compute it. A captured function
keeps the compiled program of its first call and the origin of each input of that program. Later
calls run the program on the current data of those inputs.

What a program reads and writes is found out rather than declared: an input is an argument of the
function, a tensor that existed before the call (a weight, an optimizer moment), or a constant that
the function created. Tensors that the function updates in place are outputs of the program, and the
program reuses their memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_xla
import torch_xla.backends
import torch_xla.core.xla_model as xm
from torch import Tensor

from rae_xla.runtime.xla import compat
from rae_xla.runtime.xla.captured_program import (
    LiveTensors,
    NotReplayableError,
    Program,
    StaleProgramError,
    describe_call,
)

logger = logging.getLogger(__name__)

MAX_CAPTURES = 4
"""Captures in a row, without a replay, after which a function is traced at each call."""


@dataclass
class ReplayCounters:
    """What the captured functions of a backend have done so far.

    Attributes:
        captures: calls that were traced in order to be replayed later.
        replays: calls that ran a captured program.
    """

    captures: int = 0
    replays: int = 0


class CapturedFunction:
    """A function of tensors that is traced for each new signature of its arguments, then replayed.

    The signature consists of the structure of the arguments, the shape, dtype and sharding of every
    tensor, the value of everything else, the gradient mode and the precision of matrix products.

    The second call is traced as well, and its graph and inputs are compared with those of the
    program. If they differ, the program is captured again; after ``MAX_CAPTURES`` captures that
    were of no use the function is traced at each call, with a warning. The program is also captured
    again if a tensor that it reads was freed in the meantime, since another one must have replaced
    it.

    Args:
        fn: takes and returns tensors in dicts, lists and tuples; it may update tensors in place.
            Reading the value of a tensor inside it is an error.
        counters: updated by every call.
        replay: False traces the function at each call.
        one_at_a_time: replay only when the devices are idle. XLA's virtual CPU devices need this:
            they are threads that wait for each other in a collective, and two programs at a time
            may occupy all threads and wait forever.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        counters: ReplayCounters,
        *,
        replay: bool = True,
        one_at_a_time: bool = False,
    ) -> None:
        self._fn, self._counters, self._replays = fn, counters, replay
        self._one_at_a_time = one_at_a_time
        self._programs: list[Program] = []
        self._useless_captures = 0

    def __call__(self, *inputs: Any) -> Any:
        """Call the function: replay it if its program is known, else trace and capture it."""
        if not self._replays:
            return self._trace_and_run(inputs)
        leaves, structure = compat.flatten(inputs)
        if any(isinstance(leaf, Tensor) and leaf.device.type != "xla" for leaf in leaves):
            self._refuse("an argument is on another device")
            return self._trace_and_run(inputs)
        key = _signature(leaves, structure)
        known = next((program for program in self._programs if program.key == key), None)
        if known is not None and known.confirmed:
            if self._one_at_a_time:
                xm.wait_device_ops()
            try:
                result = known.run(leaves)
            except StaleProgramError:
                pass
            else:
                self._counters.replays += 1
                self._useless_captures = 0
                return result
        return self._capture(inputs, leaves, key, known)

    def _trace_and_run(self, inputs: Sequence[Any]) -> Any:
        result = self._trace(inputs)
        torch_xla.sync()
        return result

    def _trace(self, inputs: Sequence[Any]) -> Any:
        with compat.execution_forbidden():
            return self._fn(*inputs)

    def _capture(
        self, inputs: Sequence[Any], leaves: list[Any], key: Hashable, known: Program | None
    ) -> Any:
        """Trace the function and run its program; keep it, or confirm the one that is known."""
        torch_xla.sync()  # what is pending after the call is then the work of the call
        xm.wait_device_ops()
        self._counters.captures += 1
        tensors = LiveTensors(leaves)
        result = compat.detach_results(self._trace(inputs))
        try:
            program, data = describe_call(result, tensors, key)
        except NotReplayableError as error:
            self._refuse(str(error))
            torch_xla.sync()
            return result
        if known is not None:
            program.confirmed = program.equals(known)
            self._programs.remove(known)
            self._useless_captures += not program.confirmed
        self._programs.append(program)
        result = program.store(compat.run_program(program.hash, data), leaves)
        # What only C++ code still refers to would be computed again by the next call.
        compat.discard_pending(torch_xla.device())
        if self._useless_captures > MAX_CAPTURES:
            self._refuse("its graph, or a tensor that it reads, changes from call to call")
        return result

    def _refuse(self, reason: str) -> None:
        name = getattr(self._fn, "__qualname__", type(self._fn).__qualname__)
        logger.warning("%s is traced at each call, which takes time on the host: %s", name, reason)
        self._replays = False
        self._programs.clear()


def _signature(leaves: Sequence[Any], structure: Any) -> Hashable:
    return (
        structure,
        tuple(
            (tuple(leaf.shape), leaf.dtype, leaf.requires_grad, compat.sharding_text(leaf))
            if isinstance(leaf, Tensor)
            else (type(leaf), leaf)
            for leaf in leaves
        ),
        torch.is_grad_enabled(),
        torch_xla.backends.get_mat_mul_precision(),
    )


def find_fault(send: Callable[[Tensor], Tensor], calls: int = 4) -> str | None:
    """Replay a small function and compare its numbers with those of the host.

    It detects a version of torch_xla in which the private functions of ``compat`` behave
    differently.

    Args:
        send: transfers a tensor from the host to the devices.
        calls: number of calls; two are traced, the others replayed.

    Returns:
        What is wrong; None if replaying works.
    """
    total, step = torch.zeros(2, 4), torch.ones(4)
    expected = total.clone()
    placed = send(total)

    def accumulate(x: Tensor) -> Tensor:
        placed.add_(x.view(1, 4) * torch.tensor([[1.0], [10.0]]).to(x.device))
        return placed.t() * 2

    counters = ReplayCounters()
    captured = CapturedFunction(accumulate, counters)
    for number in range(calls):
        x = step * (number + 1)
        expected += x.view(1, 4) * torch.tensor([[1.0], [10.0]])
        try:
            result = captured(send(x))
            xm.wait_device_ops()
            (found, *_), (state, *_) = compat.device_shards([result, placed])
        except Exception as error:
            return f"call {number + 1} fails: {error}"
        if not torch.equal(found.data, expected.t() * 2) or not torch.equal(state.data, expected):
            return f"call {number + 1} gives other numbers than the host"
    if (counters.captures, counters.replays) != (2, calls - 2):
        return f"of {calls} calls {counters.replays} were replayed"
    return None
