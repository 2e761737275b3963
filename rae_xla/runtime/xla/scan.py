"""Scan: identical blocks are compiled once and run in a loop.

Their parameters are stored stacked (``runtime.blocks``), and so are their moments and averages. Not
only the forward and backward passes shrink to those of one block, but also the parameter updates,
and with them the time to trace and compile a deep model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import groupby
from typing import Any

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, nn
from torch_xla.experimental.scan import scan

from rae_xla.runtime.blocks import stacked_name
from rae_xla.runtime.xla import compat
from rae_xla.runtime.xla.spmd_mesh import SpmdMesh

Body = Callable[[tuple[Tensor, ...], list[Tensor]], tuple[tuple[Tensor, ...], None]]


def scan_identical_blocks(
    network: nn.Module, blocks: Mapping[str, nn.Module], remat: float, mesh: SpmdMesh
) -> list[nn.Module]:
    """Make each run of identical consecutive blocks a loop.

    The first block of a run gets the stacked parameters of all, a name that covers all
    (``stacked_name``) and a ``forward`` that runs the loop. The others keep no parameters and
    return their first input.

    Args:
        network: module that contains the blocks, on the host.
        blocks: blocks by name, in the order of their calls. Each takes the output of the block
            before it and the same further inputs, which may be keywords.
        remat: share of a run, its first blocks, that save nothing but their input; they are a loop
            by themselves.
        mesh: of the run; it is tracing while a block is traced on fake tensors.

    Returns:
        The blocks that differ from both their neighbours, and those with buffers; unchanged.
    """
    compat.leave_scan_shardings_to_caller()
    remaining = []
    for names in list(_runs(blocks)):
        run = [blocks[name] for name in names]
        if len(run) == 1 or next(run[0].buffers(), None) is not None:
            remaining += run
            continue
        rematerialised = _rematerialised_count(remat, len(run))
        for part, partition in (
            (slice(rematerialised), _save_inputs_only),
            (slice(rematerialised, None), min_cut_rematerialization_partition),
        ):
            if names[part]:
                _make_loop(network, names[part], run[part], partition, mesh)
    return remaining


def _rematerialised_count(share: float, count: int) -> int:
    """``share`` of ``count`` blocks, rounded so that neither loop has a single block."""
    some = round(share * count)
    return round(share) * count if 1 in (some, count - some) else some


def _runs(blocks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Consecutive blocks of one class whose parameters have the same names and shapes.

    A run ends at a block whose output is read by others than the next block
    (``models.intermediate_heads.mark_read_blocks``): a loop returns the output of its last block.
    """

    def signature(name: str) -> object:
        block = blocks[name]
        parameters = [(n, p.shape, p.requires_grad) for n, p in block.named_parameters()]
        return name.rpartition(".")[0], type(block), parameters

    for _, alike in groupby(blocks, key=signature):
        run: list[str] = []
        for name in alike:
            run.append(name)
            if getattr(blocks[name], "output_is_read", False):
                yield run
                run = []
        if run:
            yield run


def _make_loop(
    network: nn.Module, names: list[str], run: list[nn.Module], partition: Any, mesh: SpmdMesh
) -> None:
    _stack_parameters(run)
    first, *others = run
    first.forward = ScannedForward(run, partition, mesh)
    for block in others:
        block.forward = _return_first_input
    owner, _, number = names[0].rpartition(".")
    _rename(network.get_submodule(owner), number, stacked_name(int(number), int(number) + len(run)))


def _stack_parameters(run: list[nn.Module]) -> None:
    """Move the parameters of all blocks to the first, stacked."""
    for name, parameter in list(run[0].named_parameters()):
        owner, _, last = name.rpartition(".")
        owners = [block.get_submodule(owner) for block in run]
        stacked = torch.stack([one.get_parameter(last).detach() for one in owners])
        for one in owners:
            delattr(one, last)
        owners[0].register_parameter(
            last, nn.Parameter(stacked, requires_grad=parameter.requires_grad)
        )


def _rename(owner: nn.Module, old: str, new: str) -> None:
    """Rename a child module; the order of the children stays."""
    children = list(owner.named_children())
    for name, _ in children:
        delattr(owner, name)
    for name, child in children:
        owner.add_module(new if name == old else name, child)


def _return_first_input(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


class ScannedForward:
    """The forward pass of a run of blocks, with the stacked parameters of its first block.

    Args:
        run: the blocks; the ``forward`` of the first one computes one block.
        partition: splits the traced block into a forward and a backward pass.
        mesh: of the run.
    """

    def __init__(self, run: list[nn.Module], partition: Any, mesh: SpmdMesh) -> None:
        self._block = run[0]
        self._forward: Callable[..., Any] = run[0].forward
        self._numbers = [_layer_numbers(block) for block in run]
        self._partition, self._mesh = partition, mesh
        # Kept, because torch_xla recognises a function that it has traced by its identity.
        self._body: Body | None = None

    def __call__(self, *inputs: Any, **keywords: Any) -> Tensor:
        """Run the blocks one after the other: a loop in training, unrolled without gradients."""
        names, stacked = zip(*self._block.named_parameters(), strict=True)
        if not torch.is_grad_enabled():
            return self._run_unrolled(names, stacked, inputs, keywords)
        leaves, structure = compat.flatten((inputs, keywords))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if self._body is None:
            self._body = self._make_body(names, leaves, structure.unflatten)
        # A loop carries numbers that may have a gradient: masks and positions become float32.
        carried = tuple(t if t.is_floating_point() else t.float() for t in tensors)
        with self._mesh.tracing():
            (result, *_), _ = scan(
                self._body, carried, list(stacked), self._partition, is_fn_pure=True
            )
        return result

    def _run_unrolled(
        self,
        names: tuple[str, ...],
        stacked: tuple[Tensor, ...],
        inputs: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> Tensor:
        x, *others = inputs
        forward = partial(self._forward, **keywords)
        for numbers, parameters in zip(self._numbers, zip(*stacked, strict=True), strict=True):
            _set_layer_numbers(self._block, numbers)
            values = dict(zip(names, parameters, strict=True))
            x = compat.call_with_parameters(self._block, forward, values, (x, *others))
        return x

    def _make_body(
        self, names: tuple[str, ...], leaves: list[Any], unflatten: Callable[[Any], Any]
    ) -> Body:
        """Return one iteration: from the carried inputs and the parameters of one block.

        Args:
            names: of the parameters.
            leaves: inputs of the first call. Those that are not tensors are constants.
            unflatten: nests leaves to inputs and keywords.
        """
        constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        dtypes = [leaves[i].dtype for i in places]

        def body(
            carried: tuple[Tensor, ...], parameters: list[Tensor]
        ) -> tuple[tuple[Tensor, ...], None]:
            values = dict(zip(names, parameters, strict=True))
            given = list(constants)
            for place, dtype, tensor in zip(places, dtypes, carried, strict=True):
                given[place] = tensor if dtype.is_floating_point else tensor.to(dtype)
            inputs, keywords = unflatten(given)
            forward = partial(self._forward, **keywords)
            result = compat.call_with_parameters(self._block, forward, values, inputs)
            _, *others = carried
            # What is carried on unchanged must be another tensor than the input.
            return (result.to(carried[0].dtype), *(other.clone() for other in others)), None

        return body


def _layer_numbers(block: nn.Module) -> list[int]:
    """Return the numbers by which the layers of transformers find their cached keys and values."""
    numbered: list[Any] = [m for m in block.modules() if hasattr(m, "layer_idx")]
    return [module.layer_idx for module in numbered]


def _set_layer_numbers(block: nn.Module, numbers: list[int]) -> None:
    numbered: list[Any] = [m for m in block.modules() if hasattr(m, "layer_idx")]
    for module, number in zip(numbered, numbers, strict=True):
        module.layer_idx = number


def _save_inputs_only(*arguments: Any, **options: Any) -> Any:
    """Partition a block so that its backward pass begins with another forward pass."""
    with compat.minimal_activation_memory():
        return min_cut_rematerialization_partition(*arguments, **options)
