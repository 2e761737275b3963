"""FDr6: the mean of Fréchet distances in the features of six networks, each divided by a constant.

Introduced with FD-loss (arXiv 2604.28190) and used by RAEv2. The networks, image sizes, constants
and names of the statistics are those of nanovisionx/nanogen-evals @ 2d04b1e, ``fd_evaluator``. That
code loads the networks with timm; here they are those of transformers with the same weights, set up
as timm does. It computes the vision transformers in bf16, and we in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FDR6 = "fdr6"


@dataclass(frozen=True)
class Extractor:
    """One of the six networks.

    Attributes:
        name: of its features, of its distance ``fdr_<name>``, and of its key in ``weights.fdr6``.
        hub_id: its weights on the Hugging Face hub.
        side: of the images that it receives, in pixels.
        features: their number.
        constant: that its Fréchet distance is divided by.
        statistics: file of its moments on ImageNet 256 in nanovisionx/nanogen-evals-stats.
    """

    name: str
    hub_id: str
    side: int
    features: int
    constant: float
    statistics: str

    @property
    def metric(self) -> str:
        """Name of its distance."""
        return f"fdr_{self.name}"


EXTRACTORS = (
    Extractor("inception", "", 299, 2048, 1.68, "guided_diffusion_stats.npz"),
    Extractor(
        "convnext",
        "facebook/convnextv2-base-22k-224",
        224,
        1024,
        56.87,
        "convnext_in256_t224_stats.npz",
    ),
    Extractor(
        "dinov2",
        "facebook/dinov2-large",
        256,
        1024,
        14.19,
        "vit_large_patch14_dinov2_lvd142m_in256_t256_stats.npz",
    ),
    Extractor(
        "mae",
        "facebook/vit-mae-large",
        224,
        1024,
        0.04,
        "vit_large_patch16_224_mae_in256_t224_stats.npz",
    ),
    Extractor(
        "siglip2",
        "google/siglip2-so400m-patch16-256",
        224,
        1152,
        0.60,
        "vit_so400m_patch16_siglip_256_v2_webli_in256_t224_stats.npz",
    ),
    Extractor(
        "clip",
        "openai/clip-vit-large-patch14",
        256,
        1024,
        5.60,
        "vit_large_patch14_clip_224_openai_in256_t256_stats.npz",
    ),
)

BY_METRIC = {extractor.metric: extractor for extractor in EXTRACTORS}
"""The extractors by the name of their distance."""

FEATURES = {e.metric: "pool" if e.name == "inception" else e.name for e in EXTRACTORS}
"""The features that each of the six distances compares."""


def with_parts(metrics: Sequence[str]) -> list[str]:
    """Return metrics with the six distances in place of ``fdr6``."""
    return [part for name in metrics for part in (BY_METRIC if name == FDR6 else (name,))]


def combine_parts(values: dict[str, float]) -> dict[str, float]:
    """Return metrics in which the six distances are divided by their constants, and their mean."""
    parts = {name: values[name] / e.constant for name, e in BY_METRIC.items() if name in values}
    if not parts:
        return values
    return {**values, FDR6: sum(parts.values()) / len(parts), **parts}
