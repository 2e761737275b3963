"""Internal guidance: extrapolation from a model's base head to its output (RAEv2).

    guided = base + scale * (full - base)

``base`` is the prediction of a head on an early block (``models.intermediate_heads``). It costs no
further evaluation of the model. Classifier-free guidance can be applied on top: both the
conditional and the null prediction are then guided internally first. Each has its own interval of
times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.transport.steps import ModelFn


@dataclass(frozen=True)
class Strength:
    """The scale of one kind of guidance, and where it is applied.

    Attributes:
        scale: 1 is no guidance.
        interval: (t_min, t_max) of shifted times, both included.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def covers(self, time: float) -> bool:
        """Return whether a time is in the interval."""
        # In float32, like t on the device: otherwise a bound such as 0.7 would exclude itself.
        low, time, high = torch.tensor(
            (self.interval[0], time, self.interval[1]), dtype=torch.float32
        ).tolist()
        return low <= time <= high

    def rows(self, t: Tensor) -> Tensor:
        """Return which of the times (B,) are in the interval."""
        return (t >= self.interval[0]) & (t <= self.interval[1])


# Compared and hashed by identity, because a solver caches one compiled step per branch.
@dataclass(eq=False)
class InternallyGuided:
    """A model with bound labels and internal guidance, built by ``guided``.

    ``y`` may be replaced by the labels of another batch: compiled steps of a solver stay valid.

    Attributes:
        model: ``model(x, t, y, all_outputs=True)`` returns an object with ``full`` and ``base``.
        y: (B,) int64 labels, or (B, ...) conditions.
        internal: internal guidance; active if its scale or ``null_scale`` guides.
        null_scale: scale of the null prediction's internal guidance; None: that of ``internal``.
        cfg: classifier-free guidance on top; active if its scale is above 1.
        null_label: label or condition of the null prediction.
    """

    model: Callable[..., Any]
    y: Tensor
    internal: Strength
    null_scale: float | None
    cfg: Strength
    null_label: int | Tensor | None
    _branches: dict[tuple[bool, bool], ModelFn] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        flags = [(internal, cfg) for internal in (False, True) for cfg in (False, True)]
        self._branches = {key: partial(self._at_one_time, *key) for key in flags}

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the prediction at x (B, ...) and t (B,), guided where t is in the intervals."""
        internal_rows = self.internal.rows(t) if self._uses_internal else None
        out = self._branch(x, t, self.y, self.internal.scale, internal_rows)
        if self._uses_cfg:
            null = self._branch(x, t, self._null(self.y), self._null_scale, internal_rows)
            guided = null + self.cfg.scale * (out - null)
            out = torch.where(_like(self.cfg.rows(t), out), guided, out)
        return out

    def at(self, time: float) -> ModelFn:
        """Return the function to evaluate when all rows are at ``time``."""
        return self._branches[
            self._uses_internal and self.internal.covers(time),
            self._uses_cfg and self.cfg.covers(time),
        ]

    @property
    def _uses_internal(self) -> bool:
        return self.internal.scale > 1 or self.null_scale not in (None, 1.0)

    @property
    def _uses_cfg(self) -> bool:
        return self.cfg.scale > 1

    @property
    def _null_scale(self) -> float:
        return self.internal.scale if self.null_scale is None else self.null_scale

    def _at_one_time(self, internal: bool, cfg: bool, x: Tensor, t: Tensor) -> Tensor:
        """Return the prediction, with the kinds of guidance that apply to all rows."""
        if len(x) != len(self.y):
            raise UserError(f"guided: x has {len(x)} rows, but there are {len(self.y)} labels")
        if not cfg:
            full, base = self._outputs(x, t, self.y, internal)
            return full if base is None else _extrapolate(base, full, self.internal.scale)
        # One forward pass of twice the batch. Rows alternate, so that both rows of a pair stay on
        # the same device when the batch is sharded.
        xx, tt = (torch.stack((rows, rows), dim=1).flatten(0, 1) for rows in (x, t))
        yy = torch.stack((self.y, self._null(self.y)), dim=1).flatten(0, 1)
        full, base = self._outputs(xx, tt, yy, internal)
        out, null = full.unflatten(0, (-1, 2)).unbind(1)
        if base is not None:
            out_base, null_base = base.unflatten(0, (-1, 2)).unbind(1)
            out = _extrapolate(out_base, out, self.internal.scale)
            null = _extrapolate(null_base, null, self._null_scale)
        return null + self.cfg.scale * (out - null)

    def _branch(self, x: Tensor, t: Tensor, y: Tensor, scale: float, rows: Tensor | None) -> Tensor:
        """Return the prediction for the labels ``y``, guided internally in some rows."""
        full, base = self._outputs(x, t, y, rows is not None)
        if base is None or rows is None:
            return full
        return torch.where(_like(rows, full), _extrapolate(base, full, scale), full)

    def _outputs(
        self, x: Tensor, t: Tensor, y: Tensor, internal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the model's prediction and, if it is needed, that of its base head."""
        if not internal:
            return self.model(x, t, y), None
        outputs = self.model(x, t, y, all_outputs=True)
        if outputs.base is None:
            raise UserError(
                "guidance method 'internal' requires a model with a base head: set "
                "stage_2.params.base_model_depth to that of its training, or choose another method"
            )
        return outputs.full, outputs.base

    def _null(self, y: Tensor) -> Tensor:
        if isinstance(self.null_label, Tensor):
            return self.null_label.to(y.dtype).expand_as(y)
        return torch.full_like(y, self.null_label)  # type: ignore[arg-type]


def _extrapolate(base: Tensor, full: Tensor, scale: float) -> Tensor:
    """Extrapolate in float32: in bfloat16 the difference would have few correct digits."""
    base = base.float()
    return base + scale * (full.float() - base)


def _like(rows: Tensor, x: Tensor) -> Tensor:
    return rows.reshape(-1, *(1,) * (x.dim() - 1))
