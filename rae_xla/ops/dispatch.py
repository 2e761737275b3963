"""Registry of device-specific implementations of the operations in ``rae_xla.ops``.

Each operation has a generic implementation that runs on every device. A device type may have
others, which are tried first. ``rae_xla.ops`` registers those that need only PyTorch when it is
imported; a backend registers those that need more, such as a kernel library and its device mesh,
when it starts, and removes them when it stops::

    registration = dispatch.register("attention", "xla", flash_attention)
    ...
    registration.remove()

An implementation takes the arguments of the operation and returns its result (True if the operation
works in place), or None if it does not support these arguments. Dispatch then continues with the
implementation that was registered before it, and ends with the generic one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

Implementation = Callable[..., Any]

OPERATIONS = (
    "attention",
    "rotary_attention",
    "apply_rope",
    "cross_entropy",
    "gather_tokens",
    "layer_norm",
    "adamw_",
    "average_",
)
"""Operations that dispatch, by the name of their function in ``rae_xla.ops``."""

# Operation -> device type -> implementations, the latest registration first. A device belongs to
# the process, and so does this table; only `register` and `Registration.remove` change it.
_implementations: dict[str, dict[str, list[Implementation]]] = {name: {} for name in OPERATIONS}

# Device types whose computations are recorded and compiled as fixed graphs.
_STATIC_GRAPH_DEVICE_TYPES = ("xla",)


@dataclass(frozen=True)
class Registration:
    """Handle of one registered implementation; as a context manager it removes it on exit."""

    operation: str
    device_type: str
    implementation: Implementation

    def remove(self) -> None:
        """Remove the implementation; do nothing if it has been removed already."""
        registered = _implementations[self.operation].get(self.device_type, [])
        if self.implementation in registered:
            registered.remove(self.implementation)

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def register(operation: str, device_type: str, implementation: Implementation) -> Registration:
    """Register an implementation, to be tried before those registered earlier.

    Args:
        operation: name of the operation, one of ``OPERATIONS``.
        device_type: type of the devices it runs on, such as ``"xla"`` or ``"cuda"``.
        implementation: called with the operation's arguments; returns the result, or None if it
            does not support them.

    Returns:
        A handle whose ``remove`` undoes the registration.

    Raises:
        ValueError: if there is no such operation.
    """
    if operation not in _implementations:
        raise ValueError(f"unknown operation {operation!r}; choose one of {', '.join(OPERATIONS)}")
    _implementations[operation].setdefault(device_type, []).insert(0, implementation)
    return Registration(operation, device_type, implementation)


def implementations(operation: str, device_type: str) -> tuple[Implementation, ...]:
    """Return the implementations of an operation on a device type, in the order to try them."""
    return tuple(_implementations[operation].get(device_type, ()))


def call(operation: str, device_type: str, *args: Any) -> Any:
    """Return the result of the first implementation that supports the arguments, or None."""
    for implementation in implementations(operation, device_type):
        result = implementation(*args)
        if result is not None:
            return result
    return None


def requires_static_graph(device: torch.device) -> bool:
    """Return whether computations on ``device`` are compiled as graphs of a fixed form.

    On such a device the number and the kind of operations cannot depend on computed values.
    """
    return device.type in _STATIC_GRAPH_DEVICE_TYPES
