"""Guidance of samplers: classifier-free guidance and autoguidance, limited to a time interval.

    guided = weak + scale * (model - weak)

where ``weak`` is the model with the null label (classifier-free guidance, Ho and Salimans, 2022),
or a weaker model with the same label (autoguidance, Karras et al., 2024). Internal guidance is in
``transport.internal_guidance``. Outside the interval
(Kynkaanniemi et al., 2024) the prediction is the model's, and ``weak`` is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.transport.internal_guidance import InternallyGuided, Strength
from rae_xla.transport.steps import ModelFn, choose

# (x, t, y) -> prediction of the shape of x
ConditionalModel = Callable[[Tensor, Tensor, Tensor], Tensor]

IMAGENET_CLASSES = 1000
GUIDANCE_METHODS = ("cfg", "autoguidance", "internal")


# Compared and hashed by identity, because a solver caches one compiled step per branch.
@dataclass(eq=False)
class Guided:
    """A model with bound labels and guidance, built by :func:`guided`.

    ``y`` may be replaced by the labels of another batch: compiled steps of a solver stay valid. A
    condition other than a class label, such as vectors per token, has a null tensor.

    A call applies guidance only to the rows whose time is in the interval, for which it has to
    read ``t`` on the host. A solver, which knows the time, gets a branch from :meth:`at` instead.

    Attributes:
        model: ``model(x, t, y)``.
        y: (B,) int64 labels, or (B, ...) conditions.
        scale: strength of guidance; none if at most 1.
        null_label: label or condition of the unconditional prediction, for classifier-free
            guidance.
        guide: the weaker model, for autoguidance.
        interval: (t_min, t_max) of shifted times, both included.
    """

    model: ConditionalModel
    y: Tensor
    scale: float
    null_label: int | Tensor | None
    guide: ConditionalModel | None
    interval: tuple[float, float]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the prediction at x (B, ...) and t (B,), guided where t is in the interval."""
        self._check_batch(x)
        host_t = t.detach().cpu()
        low, high = self.interval
        rows = torch.nonzero((host_t >= low) & (host_t <= high) & (self.scale > 1)).flatten()
        if len(rows) == 0:
            return self.conditional(x, t)
        if len(rows) == len(x):
            return self.guided(x, t)
        rows = rows.to(x.device)
        out = self.conditional(x, t)
        weak = self._weak(x[rows], t[rows], self.y[rows])
        return out.index_copy(0, rows, weak + self.scale * (out[rows] - weak))

    def at(self, time: float) -> ModelFn:
        """Return the function to evaluate when all rows are at ``time``."""
        # In float32, like t on the device: otherwise a bound such as 0.7 would exclude itself.
        low, time, high = torch.tensor(
            (self.interval[0], time, self.interval[1]), dtype=torch.float32
        ).tolist()
        return self.guided if self.scale > 1 and low <= time <= high else self.conditional

    def conditional(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the model's prediction without guidance."""
        return self.model(x, t, self.y)

    def guided(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the guided prediction for all rows."""
        self._check_batch(x)
        if self.guide is not None:
            out, weak = self.conditional(x, t), self._weak(x, t, self.y)
        else:
            # One forward pass of twice the batch. Rows alternate, so that both rows of a pair stay
            # on the same device when the batch is sharded.
            xx, tt = (torch.stack((rows, rows), dim=1).flatten(0, 1) for rows in (x, t))
            yy = torch.stack((self.y, self._null(self.y)), dim=1).flatten(0, 1)
            both = self.model(xx, tt, yy)
            out, weak = both.unflatten(0, (-1, 2)).unbind(1)
        return weak + self.scale * (out - weak)

    def _weak(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.guide is not None:
            return self.guide(x, t, y)
        return self.model(x, t, self._null(y))

    def _null(self, y: Tensor) -> Tensor:
        if isinstance(self.null_label, Tensor):
            return self.null_label.to(y.dtype).expand_as(y)
        return torch.full_like(y, self.null_label)  # type: ignore[arg-type]

    def _check_batch(self, x: Tensor) -> None:
        if len(x) != len(self.y):
            raise UserError(f"guided: x has {len(x)} rows, but there are {len(self.y)} labels")


def guided(
    model: ConditionalModel,
    y: Tensor,
    *,
    scale: float = 1.0,
    method: str = "cfg",
    null_label: int | Tensor | None = None,
    guide: ConditionalModel | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    cfg: Strength | None = None,
    null_scale: float | None = None,
) -> Guided | InternallyGuided:
    """Bind labels and guidance to a model, to get a ``model_fn(x, t)`` for the samplers.

    Args:
        model: ``model(x, t, y)``, in eval mode; for ``internal`` a model with a base head, called
            as ``model(x, t, y, all_outputs=True)``.
        y: (B,) int64 labels, or (B, ...) conditions.
        scale: strength of guidance; none if at most 1, whatever the method.
        method: ``cfg`` (classifier-free guidance), ``autoguidance`` or ``internal``.
        null_label: label of the unconditional prediction, for ``cfg``, or a tensor that broadcasts
            to ``y``. By default ``model.num_classes``, or ImageNet's 1000 for a model without this
            attribute.
        guide: the weaker model, for ``autoguidance``; called with the same x, t and y.
        interval: (t_min, t_max) of *shifted* times, both included, in which guidance is applied.
        cfg: classifier-free guidance on top of ``internal``.
        null_scale: scale of the null prediction's internal guidance, with ``cfg``; by default
            ``scale``.

    Raises:
        UserError: if the method is unknown, the guide is missing, an interval is empty, or options
            of another method are given.
    """
    method = choose("guidance method", method, GUIDANCE_METHODS)
    strength = _checked(Strength(float(scale), (float(interval[0]), float(interval[1]))))
    if method != "internal" and (cfg is not None or null_scale is not None):
        raise UserError(f"cfg and null_scale are options of method 'internal', not of {method!r}")
    if method == "autoguidance":
        if scale > 1 and guide is None:
            raise UserError("guidance method 'autoguidance' requires a guide model; set guide=...")
    else:
        guide = None
        if null_label is None:
            null_label = getattr(model, "num_classes", IMAGENET_CLASSES)
    if method == "internal":
        cfg = _checked(cfg or Strength())
        return InternallyGuided(model, y, strength, null_scale, cfg, null_label)
    return Guided(model, y, strength.scale, null_label, guide, strength.interval)


def _checked(strength: Strength) -> Strength:
    """Return the strength; raise ``UserError`` if its scale or interval is invalid."""
    if not math.isfinite(strength.scale):
        raise UserError(f"guidance scale must be a finite number, got {strength.scale!r}")
    t_min, t_max = strength.interval
    if not t_min < t_max:
        raise UserError(f"guidance interval: t_min must be below t_max, got {strength.interval}")
    return strength
