"""Evaluators: quality metrics of a model in training, configured by the ``eval`` section.

Stage 1 evaluates reconstructions of validation images, stage 2 generated samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rae_xla.config.validation import GEN_METRICS, RECON_METRICS
from rae_xla.data.shards.index import open_index
from rae_xla.errors import UserError
from rae_xla.evaluate.feature_networks import FeatureNetwork
from rae_xla.evaluate.generation import evaluate_generation, load_networks
from rae_xla.evaluate.image_sets import GeneratedImageSet, first_images
from rae_xla.evaluate.inception import load_inception
from rae_xla.evaluate.reconstruction import evaluate_reconstruction
from rae_xla.evaluate.references import (
    Reference,
    load_fid_reference,
    load_generation_reference,
)
from rae_xla.models.lpips import LPIPS, load_lpips
from rae_xla.models.rae import RAE
from rae_xla.runtime import Backend
from rae_xla.runtime.data_workers import worker_count
from rae_xla.sample.sampler import ImageSampler

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.config.training_schema import EvalConfig

logger = logging.getLogger(__name__)

LITE_SUFFIX = "_lite"
"""Suffix of the metrics of a lite evaluation: few samples are not comparable with many."""

DEFAULT_RECON_METRICS = ("psnr", "ssim", "rfid")
DEFAULT_GEN_METRICS = ("fid", "is")


def _metrics(
    settings: EvalConfig, available: Sequence[str], default: tuple[str, ...], stage: str
) -> tuple[str, ...]:
    """Return ``eval.metrics``, or the default; raises ``UserError`` for another stage's metric."""
    metrics = settings.metrics or default
    for metric in metrics:
        if metric not in available:
            raise UserError(
                f"eval.metrics: {stage} has no metric {metric!r}; choose from "
                f"{', '.join(available)}"
            )
    return metrics


class ReconstructionEvaluator:
    """Evaluates the reconstructions of a stage-1 run.

    Networks and reference are loaded once, before the first step: a missing file is reported before
    anything is computed, and later evaluations compile nothing new.

    Args:
        config: with an ``eval`` section.
        backend: of the run.
        image_size: side of a reconstruction in pixels.
        lpips: the network of the loss, if it has one, which is then used here as well. It must be
            on the devices before the first evaluation.

    Raises:
        UserError: there are no validation images, or a file that a metric needs is missing.
    """

    def __init__(
        self, config: RunConfig, backend: Backend, image_size: int, lpips: LPIPS | None
    ) -> None:
        assert config.eval is not None
        self._settings, self._backend = config.eval, backend
        self._workers = worker_count(backend, config.data.num_workers)
        path = config.eval.data_path or config.data.val
        if path is None:
            raise UserError(
                "eval needs validation images: set eval.data_path=SHARDS or data.val=SHARDS, or "
                "train without evaluation: eval=null"
            )
        self._index = open_index(path)
        first_images(self._index, config.eval.num_images, "eval.num_images=")
        metrics = self._metrics = _metrics(
            config.eval, RECON_METRICS, DEFAULT_RECON_METRICS, "stage 1"
        )
        self._lpips = lpips
        if lpips is None and "lpips" in metrics:
            self._lpips = load_lpips(config.weights.vgg16, config.weights.lpips)
            backend.place(self._lpips)
        self._features: FeatureNetwork | None = None
        self._reference: Reference | None = None
        self._reference_logged = False
        if "rfid" in metrics:
            others = ",".join(name for name in metrics if name != "rfid")
            without = f"eval.metrics=[{others}]" if others else "eval=null"
            network = load_inception(config.weights.inception, without)
            self._features = FeatureNetwork(network, backend)
            if config.eval.reference_npz_path is not None:
                self._reference = load_fid_reference(
                    config.eval.reference_npz_path, self._features, backend, image_size
                )

    def __call__(self, rae: RAE, on_progress: Callable[[], None]) -> dict[str, float]:
        """Evaluate an autoencoder on the devices; all processes call this together.

        Args:
            rae: with the decoder to evaluate.
            on_progress: called after every group of images.
        """
        report = evaluate_reconstruction(
            rae,
            self._backend,
            self._index,
            metrics=self._metrics,
            num_images=self._settings.num_images,
            batch_size=self._settings.batch_size,
            lpips=self._lpips,
            features=self._features,
            reference=self._reference,
            num_workers=self._workers,
            on_progress=on_progress,
        )
        if report.reference is not None and not self._reference_logged:
            logger.info("eval/rfid: the reference is %s", report.reference)
            self._reference_logged = True
        # The features of the originals are computed once.
        self._reference = report.reference
        return dict(report.metrics)


class GenerationEvaluator:
    """Evaluates the samples of a stage-2 run; like ``ReconstructionEvaluator``, built once.

    Samples are spread equally over the classes and generated without guidance, to measure the model
    itself. Their seed and indices are the same every time, so that only the weights differ.

    Args:
        config: with an ``eval`` section.
        backend: of the run.
        image_size: side of a sample in pixels.

    Raises:
        UserError: there is no reference, or the file of a network is missing.
    """

    def __init__(self, config: RunConfig, backend: Backend, image_size: int) -> None:
        assert config.eval is not None
        self._config, self._settings, self._backend = config, config.eval, backend
        self._image_size = image_size
        self._metrics = _metrics(config.eval, GEN_METRICS, DEFAULT_GEN_METRICS, "stage 2")
        settings = config.eval
        reference = settings.reference_npz_path or settings.data_path or config.data.val
        if reference is None and self._metrics != ("is",):
            raise UserError(
                "eval needs images to compare with: set eval.reference_npz_path=FILE.npz, "
                "data.val=SHARDS or eval.data_path=SHARDS, or train without evaluation: eval=null"
            )
        self._networks = load_networks(
            config.weights.inception,
            config.weights.dinov2,
            backend,
            self._metrics,
            fdr6=asdict(config.weights.fdr6),
            without=lambda others: f"eval.metrics=[{','.join(others)}] or eval=null",
        )
        self._reference = None
        if reference is not None and self._metrics != ("is",):
            self._reference = load_generation_reference(
                reference,
                image_size,
                backend,
                self._networks,
                self._metrics,
                name=settings.reference,
                fdr6=settings.fdr6_reference,
                num_images=settings.num_images,
                batch_size=settings.batch_size,
                num_workers=worker_count(backend, config.data.num_workers),
            )
            logger.info("evaluation: the reference is %s", self._reference.source)
            for metric, reason in self._reference.unavailable.items():
                logger.warning("evaluation: %s is not available: %s", metric, reason)

    def __call__(
        self, sampler: ImageSampler, on_progress: Callable[[], None], *, lite: bool
    ) -> dict[str, float]:
        """Generate samples and evaluate them; all processes call this together.

        Args:
            sampler: of the model.
            on_progress: called at every step of the sampler and after every chunk of images.
            lite: generate few samples, and append ``LITE_SUFFIX`` to the names of the metrics.
        """
        settings = self._settings
        count = settings.lite_samples if lite else settings.num_samples
        generated = GeneratedImageSet(
            sampler,
            count,
            self._image_size,
            num_classes=self._config.misc.num_classes,
            seed=self._config.training.global_seed,
            batch_size=settings.batch_size,
            on_progress=on_progress,
        )
        report = evaluate_generation(
            [generated],
            self._backend,
            self._networks,
            metrics=self._metrics,
            reference=self._reference,
            batch_size=settings.batch_size,
            on_progress=on_progress,
        )
        suffix = LITE_SUFFIX if lite else ""
        [(_, metrics)] = report.sets
        return {f"{n}{suffix}": v for n, v in metrics.items() if n in self._metrics}
