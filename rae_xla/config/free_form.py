"""Checks of values that are more than their type says: names, patterns and free-form sections.

The names are those that ``rae_xla.transport`` knows, which is a layer above. A wrong one would
otherwise be found when the first image is generated, thousands of steps into a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rae_xla.config.paths import LOCAL_OR_HUB, parse_path
from rae_xla.config.ranges import COUNT, COUNT_OR_ZERO, EPSILON, Range
from rae_xla.config.run import RunConfig
from rae_xla.config.text_to_image_checks import check_number, check_text_to_image
from rae_xla.config.training_schema import OptimizerConfig
from rae_xla.config.typed import Origin
from rae_xla.errors import UserError

ODE_METHODS = (
    "euler", "heun", "heun2", "midpoint", "heun3", "rk4",
    "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver",
    "explicit_adams", "implicit_adams", "fixed_adams",
)  # fmt: skip
SDE_METHODS = ("euler", "heun")
DIFFUSION_FORMS = (
    "constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing",
)  # fmt: skip
LAST_STEPS = ("Mean", "Tweedie", "Euler")

_PUBLISHED_FORM = "inccreasing-decreasing"
_LOGIT = Range(least=-1000, most=1000)
_SPREAD = Range(above=0, most=1000)

ENCODER_PATHS = ("dinov2_path", "model_name")
"""Keys of ``encoder_params`` that are paths or hub ids."""

_ENCODER_NUMBERS = {"input_size": COUNT, "layers": COUNT_OR_ZERO, "norm_eps": EPSILON}
_ENCODER_FLAGS = ("normalize", "token_mean")


def check_names(config: RunConfig, origin: Origin) -> None:
    """Raise ``UserError`` if a name or a pattern of a configuration is not one."""
    _check_time_distribution(config, origin)
    sampler = config.sampler.params
    methods = ODE_METHODS if config.sampler.mode == "ODE" else SDE_METHODS
    forms = (*DIFFUSION_FORMS, _PUBLISHED_FORM)
    for name, valid, shown in (
        ("sampling_method", methods, methods),
        ("diffusion_form", forms, DIFFUSION_FORMS),
        ("last_step", LAST_STEPS, (*LAST_STEPS, "null")),
    ):
        value = getattr(sampler, name)
        if value is not None and value.lower() not in [known.lower() for known in valid]:
            key = f"sampler.params.{name}"
            mode = f" in {config.sampler.mode} mode" if name == "sampling_method" else ""
            raise UserError(
                f"{key} ({origin.describe(key)}): expected one of {', '.join(shown)}{mode}, "
                f"got {value}"
            )
    for key, optimizer in _optimizers(config):
        _check_matrices(optimizer, f"{key}.matrices", origin)
    if config.text_to_image is not None:
        check_text_to_image(config.text_to_image, origin)


def check_encoder_params(given: Mapping[str, Any], key: str, origin: Origin) -> dict[str, Any]:
    """Return the arguments of an encoder class with its paths in their normal form.

    Arguments that only some classes have are checked by the class.

    Args:
        given: the arguments.
        key: of the section.
        origin: for error messages.

    Raises:
        UserError: a path, a number or a flag cannot be what it is.
    """
    params = dict(given)
    for name, value in params.items():
        where = f"{key}.{name} ({origin.describe(f'{key}.{name}')})"
        if name in ENCODER_PATHS and isinstance(value, str):
            params[name] = parse_path(value, where, LOCAL_OR_HUB)
        elif name in _ENCODER_FLAGS and not isinstance(value, bool):
            raise UserError(f"{where}: expected true or false, got {value}")
        elif name in _ENCODER_NUMBERS and value is not None:
            for number in value if isinstance(value, Sequence) else [value]:
                check_number(number, _ENCODER_NUMBERS[name], where)
    return params


def _check_time_distribution(config: RunConfig, origin: Origin) -> None:
    key = "transport.params.time_dist_type"
    name = config.transport.params.time_dist_type
    number = r"([-+]?[\d.]+(?:[eE][-+]?\d+)?)"
    match = re.fullmatch(f"logit-normal_{number}_{number}", name)
    try:
        valid = name == "uniform" or (
            match is not None
            and _LOGIT.contains(float(match[1]))
            and _SPREAD.contains(float(match[2]))
        )
    except ValueError:  # several points
        valid = False
    if not valid:
        raise UserError(
            f"{key} ({origin.describe(key)}): expected uniform, or logit-normal_MU_SIGMA with a "
            f"MU of at least -1000 and at most 1000 and a SIGMA above 0 and at most 1000, such as "
            f"logit-normal_0_1, got {name}"
        )


def _optimizers(config: RunConfig) -> Iterator[tuple[str, OptimizerConfig]]:
    yield "training.optimizer", config.training.optimizer
    if config.text_to_image is not None:
        section = config.text_to_image.language_model_optimizer
        yield "text_to_image.language_model_optimizer", section


def _check_matrices(optimizer: OptimizerConfig, key: str, origin: Origin) -> None:
    """Raise ``UserError`` if a pattern is not a regular expression, or there is none."""
    where = f"{key} ({origin.describe(key)})"
    if optimizer.matrices == ():
        raise UserError(f"{where}: the list is empty: write null to optimise every matrix")
    for pattern in optimizer.matrices or ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}") from None
