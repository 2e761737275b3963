"""Captured programs: what a traced call reads, updates and returns, and how to run it again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_xla
from torch import Tensor

from rae_xla.runtime.xla import compat


class NotReplayableError(Exception):
    """A function cannot be replayed; the message says why."""


class StaleProgramError(Exception):
    """A tensor that a program reads no longer exists."""


@dataclass(frozen=True)
class _Argument:
    """Leaf number ``index`` of the arguments of a call."""

    index: int


@dataclass(frozen=True, eq=False)
class _External:
    """A tensor that the function refers to, which is not kept alive.

    Attributes:
        refs: to the tensor objects that share its data; one that is alive is enough.
    """

    refs: tuple[weakref.ref[Tensor], ...]

    def tensors(self) -> list[Tensor]:
        """Return the tensor objects that are alive."""
        return [tensor for ref in self.refs if (tensor := ref()) is not None]

    def same(self, other: _External) -> bool:
        """Return whether both refer to a common tensor object."""
        return not {id(t) for t in self.tensors()}.isdisjoint(id(t) for t in other.tensors())


@dataclass(frozen=True)
class _Constant:
    """A tensor that the function creates from host data, the same in every call."""

    value: Tensor


@dataclass(frozen=True)
class _Result:
    """Output number ``index`` of the program."""

    index: int


@dataclass(frozen=True)
class _Plain:
    """A leaf of the function's result that is not a tensor."""

    value: Any


_Source = _Argument | _External | _Constant


@dataclass
class Program:
    """A compiled program and what connects it to the function that it was captured from.

    Attributes:
        key: signature of the calls that it serves.
        hash: torch_xla's key of the program.
        sources: the origin of each input, in order.
        updated: the tensors that the function updates in place: the first outputs, in order.
        results: where each leaf of the function's result comes from.
        nest: builds the function's result from its leaves.
        confirmed: whether a second trace of the function gave the same program.
    """

    key: Hashable
    hash: Any
    sources: list[_Source]
    updated: list[_Argument | _External]
    results: list[_Source | _Result | _Plain]
    nest: Callable[[Sequence[Any]], Any]
    confirmed: bool = False

    def run(self, leaves: Sequence[Any]) -> Any:
        """Run the program on the current data of its inputs; returns the function's result.

        Raises:
            StaleProgramError: a tensor that the program reads no longer exists.
        """
        inputs = [_resolve(source, leaves) for source in self.sources]
        for result in self.results:
            if isinstance(result, _External):
                _resolve(result, leaves)  # raises before anything is computed
        if any(compat.are_pending(inputs)):
            torch_xla.sync()
        return self.store(compat.run_program(self.hash, inputs), leaves)

    def store(self, outputs: Sequence[Tensor], leaves: Sequence[Any]) -> Any:
        """Give the updated tensors their new data; returns the function's result."""
        for target, output in zip(self.updated, outputs, strict=False):
            shared = target.tensors() if isinstance(target, _External) else [leaves[target.index]]
            for tensor in shared:
                tensor.data = output
        found = []
        for result in self.results:
            if isinstance(result, _Result):
                found.append(outputs[result.index])
            elif isinstance(result, _Plain):
                found.append(result.value)
            else:
                found.append(_resolve(result, leaves))
        return self.nest(found)

    def equals(self, other: Program) -> bool:
        """Return whether another capture is of the same program with the same connections."""

        def same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
            return len(ours) == len(theirs) and all(map(_same_source, ours, theirs))

        return (
            self.hash == other.hash
            and same(self.updated, other.updated)
            and same(self.sources, other.sources)
            and same(self.results, other.results)
        )


def _resolve(source: _Source, leaves: Sequence[Any]) -> Tensor:
    if isinstance(source, _External):
        if not (tensors := source.tensors()):
            raise StaleProgramError
        return tensors[0]
    if isinstance(source, _Argument):
        found: Tensor = leaves[source.index]
        return found
    return source.value


def _same_source(one: Any, other: Any) -> bool:
    if isinstance(one, _External) and isinstance(other, _External):
        return one.same(other)
    if isinstance(one, _Constant) and isinstance(other, _Constant):
        shards = [compat.device_shards([constant.value])[0][0] for constant in (one, other)]
        return torch.equal(shards[0].data, shards[1].data)
    return bool(one == other)


def _live_tensors() -> list[Tensor]:
    """Return the tensors on the devices that Python code can refer to, but not those of programs.

    The garbage collector knows all of them.
    """
    objects = gc.get_objects()
    constants = {id(o.value) for o in objects if type(o) is _Constant}
    tensors = [o for o in objects if issubclass(type(o), Tensor) and id(o) not in constants]
    return [t for t in tensors if t.device.type == "xla" and compat.is_xla_tensor(t)]


def _viewed(tensor: Tensor) -> Tensor:
    """Return the tensor that a view was taken from, which the view keeps alive; else itself."""
    return tensor if tensor._base is None else tensor._base


class LiveTensors:
    """The tensors on the devices that exist before a call, by torch_xla's identifier.

    Args:
        leaves: of the arguments of the call.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        self._arguments = {id(leaf): i for i, leaf in enumerate(leaves)}
        self._by_id: dict[int, list[Tensor]] = {}
        self._identifiers: dict[int, int] = {}
        for tensor in [leaf for leaf in leaves if isinstance(leaf, Tensor)] + _live_tensors():
            if id(tensor) not in self._identifiers:
                identifier = self._identifiers[id(tensor)] = compat.tensor_id(tensor)
                self._by_id.setdefault(identifier, []).append(tensor)
        # The garbage collector's order may differ between processes; that of creation does not.
        self._by_id = dict(sorted(self._by_id.items()))
        self._by_handle = {compat.tensor_handle(of[0]): of[0] for of in self._by_id.values()}
        self.newest = compat.tensor_id(torch.empty((), device=torch_xla.device()))

    def check_nothing_kept(self, results: Sequence[Any]) -> None:
        """Raise if a call has stored a tensor that it computed, instead of returning it.

        A replay would leave such a tensor as it is.

        Args:
            results: leaves of the result of the call.

        Raises:
            NotReplayableError: it has.
        """
        returned = {id(_viewed(leaf)) for leaf in results if isinstance(leaf, Tensor)}

        def kept() -> list[Tensor]:
            new = [
                tensor
                for tensor in _live_tensors()
                if id(tensor) not in self._identifiers and id(_viewed(tensor)) not in returned
            ]
            pending = compat.are_pending(new)
            return [t for t, is_pending in zip(new, pending, strict=True) if is_pending]

        if kept():
            gc.collect()  # they may be in reference cycles that nothing refers to
        for tensor in kept():
            raise NotReplayableError(
                f"it keeps a {tensor.dtype} tensor of shape {tuple(tensor.shape)} that it computes;"
                " return it instead"
            )
        for tensor, *_ in self._by_id.values():
            gradient = tensor.grad if tensor.is_leaf else None
            if gradient is not None and compat.are_pending([gradient])[0]:
                raise NotReplayableError(
                    f"it leaves the gradient of a parameter of shape {tuple(gradient.shape)}; set "
                    "it to None"
                )

    def updated(self) -> list[Tensor]:
        """Return the tensors whose data is pending now, one of those that share data."""
        tensors = [group[0] for group in self._by_id.values()]
        pending = compat.are_pending(tensors)
        return [t for t, is_pending in zip(tensors, pending, strict=True) if is_pending]

    def read_by(self, identifier: int, data: Tensor) -> Tensor | None:
        """Return the tensor that an input of a program was read from, if it is one of these.

        The identifier is not that of the tensor if another program has read the tensor before.
        """
        if identifier == compat.CONSTANT_ID:
            return None
        if identifier in self._by_id:
            return self._by_id[identifier][0]
        handle = compat.tensor_handle(data)
        return None if handle is None else self._by_handle.get(handle)

    def find(self, tensor: Tensor) -> _Argument | _External | None:
        """Return where a tensor comes from, if it existed before the call."""
        group = self._by_id.get(self._identifiers.get(id(tensor), compat.CONSTANT_ID), [])
        if not any(tensor is other for other in group):
            return None
        for member in group:
            if id(member) in self._arguments:
                return _Argument(self._arguments[id(member)])
        return _External(tuple(weakref.ref(member) for member in group))


def describe_call(result: Any, tensors: LiveTensors, key: Hashable) -> tuple[Program, list[Tensor]]:
    """Describe the pending graph of a traced call, and compile it if it is new.

    Returns:
        The program, and the data of its inputs in this call.

    Raises:
        NotReplayableError: it reads something other than arguments, tensors that existed before the
            call and constants, keeps a tensor that it computes, or returns a tensor that is not on
            the devices.
    """
    updated = tensors.updated()
    targets: list[Any] = [tensors.find(tensor) for tensor in updated]
    outputs = list(updated)
    # A result that shares the data of an updated tensor is that tensor.
    places: dict[int, Any] = dict(zip(map(compat.tensor_id, updated), targets, strict=True))
    leaves, structure = compat.flatten(result)
    tensors.check_nothing_kept(leaves)
    results: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            results.append(_Plain(leaf))
        elif leaf.device != torch_xla.device():
            raise NotReplayableError(f"it returns a tensor on {leaf.device}")
        elif (source := tensors.find(leaf)) is not None:
            results.append(source)
        elif compat.are_pending([leaf])[0]:
            identifier = compat.tensor_id(leaf)
            if identifier not in places:
                places[identifier] = _Result(len(outputs))
                outputs.append(leaf)
            results.append(places[identifier])
        else:
            results.append(_Constant(leaf))
    identifiers, values = compat.program_inputs(outputs)
    replaced = set(map(id, updated))
    sources: list[Any] = []
    for identifier, value in zip(identifiers, values, strict=True):
        tensor = tensors.read_by(identifier, value)
        if tensor is None:
            _check_constant(identifier, value, tensors.newest)
            sources.append(_Constant(value))
        else:
            sources.append(tensors.find(tensor))
            if id(tensor) in replaced:
                compat.allow_donation(value)
    program = Program(
        key, compat.compile_program(outputs), sources, targets, results, structure.unflatten
    )
    return program, values


def _check_constant(identifier: int, value: Tensor, newest: int) -> None:
    """Raise ``NotReplayableError`` unless an input of a program is a constant of the function."""
    if identifier == compat.seed_id():
        raise NotReplayableError("it draws from the generator of the device; use ops.random")
    if 0 <= identifier <= newest:
        raise NotReplayableError(
            f"it reads a {value.dtype} tensor of shape {tuple(value.shape)} that existed before "
            "the call and that no Python object refers to"
        )
