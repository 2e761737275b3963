"""Construction of a transport from the published options, with validation."""

from __future__ import annotations

import math

from rae_xla.errors import UserError
from rae_xla.transport.losses import LOSS_WEIGHTS, PREDICTIONS
from rae_xla.transport.paths import PATHS
from rae_xla.transport.steps import choose
from rae_xla.transport.times import parse_time_distribution
from rae_xla.transport.transport import Transport

DATA_T_EPS = 0.05  # the published default of RAEv2


def create_transport(
    path_type: str = "Linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
    time_dist_type: str = "uniform",
    time_dist_shift: float = 1.0,
    t_eps: float | None = None,
    truncate_times: bool | None = None,
) -> Transport:
    """Build a :class:`Transport` from the published options.

    Args:
        path_type: ``Linear``, ``GVP`` or ``VP``.
        prediction: what the network predicts: ``velocity``, ``noise``, ``score`` or ``x`` (the
            data, on the Linear path; RAEv2).
        loss_weight: ``velocity``, ``likelihood`` or None; see :func:`losses.prediction_loss`.
        train_eps: distance of the training times from 0 and 1; by default 1e-5 on the VP path and
            1e-3 for noise and score prediction. Ignored for velocity prediction on the Linear and
            GVP paths, which is finite everywhere.
        sample_eps: the same for sampling, where it has no default: a sampler that requires it
            raises an error if it is None.
        time_dist_type: ``uniform`` or ``logit-normal_<mean>_<std>``.
        time_dist_shift: the time shift, at least 1; published as ``sqrt(C * H * W / 4096)``.
        t_eps: least time by which a difference is divided to get a velocity; by default 0.05 for
            data prediction. For velocity prediction it applies to the target, and the default is
            0: the exact target.
        truncate_times: whether training times end at 0.999 on the Linear and GVP paths, as RAE
            published it; by default only if the network does not predict the data.

    Raises:
        UserError: if an option is invalid.
    """
    path = PATHS[choose("path_type", path_type, tuple(PATHS))]
    prediction = choose("prediction", prediction, PREDICTIONS)
    if loss_weight is not None:
        loss_weight = choose("loss_weight", loss_weight, (*LOSS_WEIGHTS, "none"))
        loss_weight = None if loss_weight == "none" else loss_weight
    for option, eps in (("train_eps", train_eps), ("sample_eps", sample_eps)):
        if eps is not None and not 0 <= eps < 0.5:
            raise UserError(f"{option} must be at least 0 and below 0.5, got {eps!r}")
    if not (math.isfinite(time_dist_shift) and time_dist_shift >= 1):
        raise UserError(f"time_dist_shift must be at least 1, got {time_dist_shift!r}")
    if prediction == "x" and path.name != "Linear":
        raise UserError(f"prediction: x requires path_type Linear, got {path.name}")
    if t_eps is not None and not 0 <= t_eps < 1:
        raise UserError(f"t_eps must be at least 0 and below 1, got {t_eps!r}")
    if prediction == "x" and t_eps == 0:
        raise UserError("t_eps must be above 0 for prediction x, which divides by the time")
    if t_eps and (path.name != "Linear" or prediction not in ("velocity", "x")):
        raise UserError(
            "t_eps is only for velocity and x prediction on the Linear path: leave it out"
        )
    if path.name == "VP":
        train_eps = 1e-5 if train_eps is None else train_eps
    elif prediction in ("velocity", "x"):
        train_eps = sample_eps = 0.0
    else:
        train_eps = 1e-3 if train_eps is None else train_eps
    return Transport(
        path=path,
        prediction=prediction,
        loss_weight=loss_weight,
        train_eps=train_eps,
        sample_eps=sample_eps,
        time_distribution=parse_time_distribution(time_dist_type),
        time_dist_shift=float(time_dist_shift),
        t_eps=DATA_T_EPS if t_eps is None and prediction == "x" else (t_eps or 0.0),
        truncate_times=prediction != "x" if truncate_times is None else truncate_times,
    )
