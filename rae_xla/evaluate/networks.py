"""The networks whose features metrics of generated pictures compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rae_xla.evaluate.dino import load_dino
from rae_xla.evaluate.generation import INCEPTION
from rae_xla.evaluate.inception import FeatureNetwork, load_inception
from rae_xla.runtime import Runtime

SECOND_OPINION = "fd_dinov2"


def load_networks(
    inception: str | None,
    dinov2: str | None,
    runtime: Runtime,
    metrics: Sequence[str],
    *,
    without: Callable[[Sequence[str]], str],
) -> list[FeatureNetwork]:
    """Those that the metrics need, placed.

    Args:
        inception: file of Inception's weights; None for torch-fidelity's own download.
        dinov2: folder or hub id of DINOv2; None for ``DINO``.
        runtime: where they are placed.
        metrics: any of ``GEN_METRICS``.
        without: the option that asks for other metrics, for the errors.

    Raises:
        UserError: one cannot be had; it says what to leave out.
    """
    networks: list[FeatureNetwork] = []
    if any(metric in INCEPTION for metric in metrics):
        network = load_inception(inception, without([SECOND_OPINION]))
        networks.append(FeatureNetwork(network, runtime))
    if SECOND_OPINION in metrics:
        others = [metric for metric in metrics if metric != SECOND_OPINION] or ["fid"]
        networks.append(FeatureNetwork(load_dino(dinov2, without(others)), runtime))
    return networks
