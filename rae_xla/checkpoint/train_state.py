"""Training state: weights, moving average, optimizer moments and step; to and from checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rae_xla.checkpoint.manager import Checkpoint, read_checkpoint_manifest
from rae_xla.checkpoint.posthoc_ema import part_name
from rae_xla.checkpoint.power_profiles import exponent
from rae_xla.checkpoint.tensors import PartTensors, read_parts, stored_parts
from rae_xla.errors import UserError
from rae_xla.models.pretrained.manifest import Manifest
from rae_xla.models.weights import check_fits, load_strict
from rae_xla.runtime import Backend
from rae_xla.runtime.snapshot import HostPart

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's moving averages of the gradient and of its square, under torch's names."""


class Checkpointable(Protocol):
    """What a checkpoint requires of a training task; ``train.tasks`` implement it."""

    @property
    def model(self) -> nn.Module:
        """The module that is trained and averaged."""
        ...

    @property
    def disc(self) -> nn.Module | None:
        """The discriminator that is trained with the model, if any."""
        ...

    @property
    def provenance(self) -> Manifest:
        """The encoder and latent statistics that the trained weights depend on."""
        ...

    @property
    def first_moment_only(self) -> Collection[str]:
        """Names of the trained parameters of ``model`` that have no second moment."""
        ...

    @property
    def average_widths(self) -> Sequence[float]:
        """Widths of the power-function averages of ``model`` that are tracked."""
        ...

    def inputs(self, step: int) -> Mapping[str, Tensor]:
        """Return the scheduled 0-d inputs of a step, such as ``lr``."""
        ...

    def to_published_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict of ``model`` to the layout of the published checkpoints."""
        ...

    def from_published_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict in the published layout to one of ``model``."""
        ...


@dataclass
class TrainedModule:
    """A module on the devices and the state of its optimizer.

    Attributes:
        module: parameters with ``requires_grad=False`` are not trained.
        moments: moment (``exp_avg``, ``exp_avg_sq``) -> name of a trained parameter -> tensor. The
            matrices of Muon have ``exp_avg`` alone, their momentum.
    """

    module: nn.Module
    moments: dict[str, dict[str, Tensor]]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the optimizer updates, by name."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state, ``<parameter>/<moment>`` -> tensor."""
        return {
            f"{name}/{moment}": tensor
            for moment, tensors in self.moments.items()
            for name, tensor in tensors.items()
        }


@dataclass
class TrainState:
    """The state of a run on the devices.

    Attributes:
        model: the trained module.
        ema: its exponential moving average, which is sampled from and published.
        step: optimizer steps taken.
        disc: the discriminator, if any.
        averages: power-function averages of the trained parameters (``power_profiles``), by width
            and name; zeros before the first step.
    """

    model: TrainedModule
    ema: nn.Module
    step: int
    disc: TrainedModule | None = None
    averages: dict[float, dict[str, Tensor]] = field(default_factory=dict)


def make_state(
    model: nn.Module,
    backend: Backend,
    saved: Mapping[str, Any] | None = None,
    where: str = "checkpoint",
    disc: nn.Module | None = None,
    first_moment_only: Collection[str] = (),
    average_widths: Sequence[float] = (),
) -> TrainState:
    """Create the training state on the devices, new or from the content of a checkpoint.

    Moments are created here rather than in the first step: creating them inside the compiled step
    would change the graph of the second one, which would be compiled again.

    Args:
        model: on the CPU; its parameters are replaced by placed ones.
        backend: to place it on.
        saved: ``model``, ``ema``, ``optimizer`` (host tensors) and ``step`` of a checkpoint, with a
            discriminator also ``disc`` and ``disc_optimizer``, and the parts of the power-function
            averages; None: a new state.
        where: the checkpoint, for error messages.
        disc: the discriminator on the CPU, if any.
        first_moment_only: names of the parameters of ``model`` that have no second moment.
        average_widths: widths of the power-function averages that are tracked.

    Raises:
        UserError: if the checkpoint does not fit the modules.
    """
    ema = copy.deepcopy(model)
    if saved is not None:
        load_strict(model, saved["model"], where)
        load_strict(ema, saved["ema"], where)
        if disc is not None:
            if "disc" not in saved or "disc_optimizer" not in saved:
                raise UserError(
                    f"{where} has no discriminator, but this run trains one: give another "
                    "--results-dir"
                )
            load_strict(disc, saved["disc"], where)
    moments = _host_moments(model, saved and saved["optimizer"], first_moment_only)
    averages = {width: _host_averages(model, saved, width) for width in average_widths}
    backend.place(model)
    backend.place(ema.requires_grad_(False).eval())
    trained = _place_moments(model, backend, moments)
    state = TrainState(trained, ema, step=0 if saved is None else int(saved["step"]))
    for width in average_widths:
        state.averages[width] = backend.place_tensors(averages.pop(width), like=model)
    if disc is not None:
        moments = _host_moments(disc, saved and saved["disc_optimizer"])
        state.disc = _place_moments(backend.place(disc), backend, moments)
    return state


def _host_moments(
    module: nn.Module, saved: Mapping[str, Tensor] | None, first_only: Collection[str] = ()
) -> dict[str, dict[str, Tensor]]:
    """Return zeros or the saved moments of a module on the host."""
    trained = TrainedModule(module, {}).parameters()
    return {
        moment: {
            name: torch.zeros(p.shape) if saved is None else saved[f"{name}/{moment}"]
            for name, p in trained.items()
            if moment == MOMENTS[0] or name not in first_only
        }
        for moment in MOMENTS
    }


def _host_averages(
    module: nn.Module, saved: Mapping[str, Any] | None, width: float
) -> dict[str, Tensor]:
    """Return zeros or the saved average of a width on the host."""
    trained = TrainedModule(module, {}).parameters()
    part = None if saved is None else saved[part_name(width)]
    return {n: torch.zeros(p.shape) if part is None else part[n] for n, p in trained.items()}


def _place_moments(
    module: nn.Module, backend: Backend, moments: dict[str, dict[str, Tensor]]
) -> TrainedModule:
    """Place moments with the sharding of a placed module; frees the host copies one by one."""
    placed = {moment: backend.place_tensors(moments.pop(moment), like=module) for moment in MOMENTS}
    return TrainedModule(module, placed)


def state_tensors(task: Checkpointable, state: TrainState) -> dict[str, Tensor]:
    """Return all tensors of a state that a checkpoint stores, on the devices.

    Args:
        task: that is trained.
        state: of the task.

    Returns:
        By ``<part>/<name>``; ``model``, ``ema`` and averages in the published layout.
    """
    parts: dict[str, Mapping[str, Tensor]] = {
        "model": task.to_published_state_dict(state.model.module.state_dict()),
        "ema": task.to_published_state_dict(state.ema.state_dict()),
        "optimizer": state.model.optimizer_tensors(),
    }
    if state.disc is not None:
        parts["disc"] = state.disc.module.state_dict()
        parts["disc_optimizer"] = state.disc.optimizer_tensors()
    for width, averages in state.averages.items():
        own = set(map(id, averages.values()))  # without the frozen modules of the layout
        published = task.to_published_state_dict(averages)
        parts[part_name(width)] = {n: t for n, t in published.items() if id(t) in own}
    return {f"{part}/{name}": t for part, of in parts.items() for name, t in of.items()}


def restore(
    task: Checkpointable,
    backend: Backend,
    checkpoint: Checkpoint | None,
    step: int | None = None,
) -> TrainState:
    """Create the training state of a task on the devices, from a checkpoint if there is one.

    Names, shapes and dtypes of all tensors are compared before any file of tensors is read.

    Args:
        task: newly constructed, on the CPU.
        backend: to place the state on.
        checkpoint: verified (see ``resume.choose_checkpoint``); None: a new state.
        step: steps taken, if they are more than those of the checkpoint: the others were skipped,
            and left the weights unchanged.

    Raises:
        UserError: if the checkpoint does not fit the task's modules.
    """
    first_only = task.first_moment_only
    if checkpoint is None:
        return make_state(
            task.model,
            backend,
            disc=task.disc,
            first_moment_only=first_only,
            average_widths=task.average_widths,
        )
    where = f"checkpoint {checkpoint}"
    manifest = read_checkpoint_manifest(checkpoint)
    required = ["model", "ema", "optimizer"]
    if task.disc is not None:
        required += ["disc", "disc_optimizer"]
    stored = stored_parts(checkpoint)
    averages = [part_name(width) for width in task.average_widths]
    if missing := [part for part in averages if part not in stored]:
        raise UserError(
            f"{where} has no {', '.join(missing)}, but training.posthoc_ema.widths asks for it: "
            "such an average needs the weights of every step from the first. Leave the widths as "
            "they were, or give another --results-dir"
        )
    if missing := [part for part in required if part not in stored]:
        names = ", ".join(missing)
        raise UserError(
            f"{where} has no {names}, but this run trains it: the checkpoint is from another run. "
            "Give another --results-dir, or the configuration of that run"
        )
    _check_stored(task, stored, where)
    needed = _needed(task, backend, stored)
    saved: dict[str, Any] = dict(read_parts(checkpoint, [*required, *averages], needed))
    published = ("model", "ema", *averages)
    saved |= {name: task.from_published_state_dict(saved[name]) for name in published}
    saved["step"] = manifest["step"]
    for width in task.average_widths:
        _skip_steps(saved[part_name(width)], saved["model"], width, saved["step"], step)
    return make_state(task.model, backend, saved, where, task.disc, first_only, task.average_widths)


def _skip_steps(
    averages: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    width: float,
    before: int,
    after: int | None,
) -> None:
    """Add the steps from ``before`` to ``after``, which left the weights unchanged, to averages."""
    if after is not None and after > before:
        share = 1 - (before / after) ** exponent(width)
        for name, average in averages.items():
            average.lerp_(weights[name], share)


def _needed(task: Checkpointable, backend: Backend, stored: PartTensors) -> dict[str, HostPart]:
    """Return which part of each stored tensor this process needs.

    Tensors that the published layout names differently are read in full.
    """
    needed: dict[str, HostPart] = {}
    own = backend.own_parts(task.model)
    published = ("model", "ema", *map(part_name, task.average_widths))
    layouts = {part: task.from_published_state_dict(stored[part]) for part in published}
    for name, part_of_tensor in own.items():
        for part, layout in layouts.items():
            if stored[part].get(name) is layout.get(name):  # the same tensor under the same name
                needed[f"{part}/{name}"] = part_of_tensor
        needed |= {f"optimizer/{name}/{moment}": part_of_tensor for moment in MOMENTS}
    for name, part_of_tensor in (backend.own_parts(task.disc) if task.disc else {}).items():
        needed[f"disc/{name}"] = part_of_tensor
        needed |= {f"disc_optimizer/{name}/{moment}": part_of_tensor for moment in MOMENTS}
    return needed


def _check_stored(task: Checkpointable, stored: PartTensors, where: str) -> None:
    """Raise ``UserError`` unless the stored tensors (on the meta device) fit the task's modules."""
    for part in ("model", "ema"):
        _check_module(task.model, task.from_published_state_dict(stored[part]), f"{where} ({part})")
    _check_moments(task.model, stored["optimizer"], f"{where} (optimizer)", task.first_moment_only)
    shapes = {n: tuple(p.shape) for n, p in TrainedModule(task.model, {}).parameters().items()}
    for part in map(part_name, task.average_widths):
        found = task.from_published_state_dict(stored[part])
        _check_shapes(shapes, {n: tuple(t.shape) for n, t in found.items()}, f"{where} ({part})")
    if task.disc is not None:
        _check_module(task.disc, stored["disc"], f"{where} (disc)")
        _check_moments(task.disc, stored["disc_optimizer"], f"{where} (disc_optimizer)")


def _check_module(module: nn.Module, stored: Mapping[str, Tensor], where: str) -> None:
    check_fits(module, stored, where)
    for name, own in module.state_dict().items():
        if stored[name].dtype != own.dtype:
            raise UserError(f"{where}: {name} is {stored[name].dtype}, expected {own.dtype}")


def _check_moments(
    module: nn.Module,
    stored: Mapping[str, Tensor],
    where: str,
    first_only: Collection[str] = (),
) -> None:
    expected = {
        f"{name}/{moment}": tuple(parameter.shape)
        for name, parameter in TrainedModule(module, {}).parameters().items()
        for moment in MOMENTS
        if moment == MOMENTS[0] or name not in first_only
    }
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    _check_shapes(expected, found, where)


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str
) -> None:
    if expected != found:
        names = expected.keys() | found.keys()
        differing = sorted(n for n in names if expected.get(n) != found.get(n))
        raise UserError(
            f"{where} does not fit the parameters that this run trains: {differing[0]} is "
            f"{found.get(differing[0])}, expected {expected.get(differing[0])} "
            f"({len(differing)} differ)"
        )
