"""Guidance at sampling time: classifier-free (Ho and Salimans, 2022) or by a weaker model
(autoguidance, Karras et al., 2024), inside an interval of times (Kynkaanniemi et al., 2024).

    guided = weak + scale * (model - weak)

where ``weak`` is the model with the null label, or the guide with the same label. Outside the
interval the answer is the model's own, and ``weak`` is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.transport.steps import ModelFn, choose

# (x, t, y) -> prediction of the shape of x
ConditionalModel = Callable[[Tensor, Tensor, Tensor], Tensor]

IMAGENET_CLASSES = 1000
GUIDANCE_METHODS = ("cfg", "autoguidance")


# Compared and hashed by identity: a solver keeps one compiled step for each of its two branches.
@dataclass(eq=False)
class Guided:
    """A model with its labels bound and guidance applied; made by :func:`guided`.

    ``y`` may be replaced by the labels of another batch: what a solver has compiled stays good.

    Called with mixed times it guides only the rows inside the interval, for which it has to read
    ``t`` on the host. A solver, which knows the time already, takes a branch from :meth:`at`.
    """

    model: ConditionalModel
    y: Tensor
    scale: float
    null_label: int | None
    guide: ConditionalModel | None
    interval: tuple[float, float]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided prediction for x (B, ...) at times t (B,)."""
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
        """The branch to evaluate when every row is at ``time``."""
        # In float32, as t is on the device: else a bound such as 0.7 would not include itself.
        low, time, high = torch.tensor(
            (self.interval[0], time, self.interval[1]), dtype=torch.float32
        ).tolist()
        return self.guided if self.scale > 1 and low <= time <= high else self.conditional

    def conditional(self, x: Tensor, t: Tensor) -> Tensor:
        """The model's own prediction."""
        return self.model(x, t, self.y)

    def guided(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided prediction, for every row."""
        self._check_batch(x)
        if self.guide is not None:
            out, weak = self.conditional(x, t), self._weak(x, t, self.y)
        else:
            # One forward of twice the batch. Rows alternate, so that with the batch sharded over
            # devices both halves of a pair stay where they are.
            xx, tt = (torch.stack((rows, rows), dim=1).flatten(0, 1) for rows in (x, t))
            yy = torch.stack((self.y, self._null(self.y)), dim=1).flatten()
            both = self.model(xx, tt, yy)
            out, weak = both.unflatten(0, (-1, 2)).unbind(1)
        return weak + self.scale * (out - weak)

    def _weak(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.guide is not None:
            return self.guide(x, t, y)
        return self.model(x, t, self._null(y))

    def _null(self, y: Tensor) -> Tensor:
        return torch.full_like(y, self.null_label)  # type: ignore[arg-type]

    def _check_batch(self, x: Tensor) -> None:
        if len(x) != len(self.y):
            raise UserError(f"guided: {len(self.y)} labels were bound, but x has {len(x)} rows")


def guided(
    model: ConditionalModel,
    y: Tensor,
    *,
    scale: float = 1.0,
    method: str = "cfg",
    null_label: int | None = None,
    guide: ConditionalModel | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Guided:
    """Bind labels and guidance to a model: a ``model_fn(x, t)`` for the samplers.

    Args:
        model: ``model(x, t, y)``, in eval mode.
        y: (B,) int64 labels.
        scale: strength of guidance; 1 or less means none, whatever the method.
        method: ``cfg`` or ``autoguidance``.
        null_label: the label that stands for "no class" (cfg); by default
            ``model.num_classes``, or ImageNet's 1000 for a model that does not say.
        guide: the weaker model (autoguidance), called with the same x, t and y.
        interval: (t_min, t_max), both included, of *shifted* times; guidance acts inside.

    Raises:
        UserError: an unknown method, a missing guide, or an empty interval.
    """
    method = choose("guidance method", method, GUIDANCE_METHODS)
    if not math.isfinite(scale):
        raise UserError(f"guidance scale: {scale!r} given; it is a finite number")
    t_min, t_max = interval
    if not t_min < t_max:
        raise UserError(f"guidance interval: {tuple(interval)} given; t_min must be below t_max")
    if method == "autoguidance":
        if scale > 1 and guide is None:
            raise UserError("guidance method 'autoguidance' needs a guide model; give guide=...")
    else:
        guide = None
        if null_label is None:
            null_label = getattr(model, "num_classes", IMAGENET_CLASSES)
    return Guided(model, y, float(scale), null_label, guide, (float(t_min), float(t_max)))
