"""Output that all reports of ``rae-xla evaluate`` share: provenance, warnings and JSON files."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rae_xla import storage

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.runtime import Backend


def provenance(
    args: argparse.Namespace, config: RunConfig, backend: Backend, metrics: tuple[str, ...]
) -> dict[str, Any]:
    """Return what the metrics depend on besides the images, for the report."""
    import torch

    from rae_xla.version import __version__

    used: dict[str, str] = {}
    if "lpips" in metrics:
        used["vgg16"] = config.weights.vgg16 or "torchvision's own"
        used["lpips"] = config.weights.lpips or "the lpips package's own"
    if {"rfid", "fid", "sfid", "is", "precision", "recall", "fdr6"} & set(metrics):
        used["inception"] = config.weights.inception or "torch-fidelity's own"
    if "fd_dinov2" in metrics:
        from rae_xla.evaluate.feature_networks import DINO

        used["dinov2"] = config.weights.dinov2 or DINO
    if "fdr6" in metrics:
        used |= {f"fdr6.{name}": str(path) for name, path in asdict(config.weights.fdr6).items()}
    return {
        "config": str(args.config) if args.config else None,
        "overrides": list(args.overrides),
        "weights": used,
        "runtime": backend.description,
        "versions": {"rae_xla": __version__, "torch": torch.__version__},
    }


def print_warnings(warnings: tuple[str, ...]) -> None:
    """Print warnings, one per line, as part of the result."""
    for warning in warnings:
        print(f"warning: {warning}")


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write a report atomically; create its folder if it does not exist."""
    storage.make_folder(storage.split(path)[0])
    storage.write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
