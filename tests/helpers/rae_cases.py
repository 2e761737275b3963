"""The tiny RAEs of ``tests/golden/rae``: their constructor arguments and how to build them."""

from __future__ import annotations

from typing import Any

from golden_case import GOLDEN, Case, load_case

from rae_xla.models.rae import RAE

CASES = ("dinov2", "dinov2_tokens_affine", "siglip2", "mae")
PATHS = (
    "encoder_config_path",
    "decoder_config_path",
    "normalization_stat_path",
    "pretrained_decoder_path",
)


def load_rae_case(name: str) -> Case:
    return load_case(f"rae/{name}/golden")


def rae_arguments(name: str, **changes: Any) -> dict[str, Any]:
    """Return a golden RAE's constructor arguments with absolute paths; ``changes`` override."""
    arguments = dict(load_rae_case(name).meta["config"])
    folder = GOLDEN / "rae" / name
    for key in PATHS:
        if arguments[key] is not None:
            arguments[key] = str(folder / arguments[key])
    arguments["encoder_params"] = {
        key: str(folder / value) if value == "encoder" else value
        for key, value in arguments["encoder_params"].items()
    }
    return arguments | changes


def build_rae(name: str, **changes: Any) -> RAE:
    return RAE(**rae_arguments(name, **changes))
