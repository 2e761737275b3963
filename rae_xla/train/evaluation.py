"""Evaluation while training, at its own cadence: reconstructions of the validation images in stage
1, samples in stage 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from tqdm import tqdm

from rae_xla.config.check import GEN_METRICS, RECON_METRICS
from rae_xla.data.shards import open_index
from rae_xla.errors import UserError
from rae_xla.evaluate.drawn import DrawnPictures
from rae_xla.evaluate.gen_reference import load_gen_reference
from rae_xla.evaluate.generation import evaluate_generation
from rae_xla.evaluate.inception import FeatureNetwork, load_inception
from rae_xla.evaluate.networks import load_networks
from rae_xla.evaluate.reconstruction import evaluate_reconstruction, first_images
from rae_xla.evaluate.reference import Reference, load_reference
from rae_xla.models.lpips import LPIPS, load_lpips
from rae_xla.models.rae import RAE
from rae_xla.runtime import Runtime
from rae_xla.sample.generate import ImageSampler

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.config.sections import EvalConfig

LITE = "_lite"
"""What the figures of a small evaluation end in: those of few samples compare with no others."""
METRICS = {"stage 1": RECON_METRICS, "stage 2": GEN_METRICS}
DEFAULTS = {"stage 1": ("psnr", "ssim", "rfid"), "stage 2": ("fid", "is")}


def stage_metrics(settings: EvalConfig, stage: str) -> tuple[str, ...]:
    """What an ``eval`` section measures in a stage.

    Raises:
        UserError: it names what only the other stage has.
    """
    metrics = settings.metrics or DEFAULTS[stage]
    for metric in metrics:
        if metric not in METRICS[stage]:
            raise UserError(
                f"eval.metrics: {stage} has no {metric}; there are {', '.join(METRICS[stage])}"
            )
    return metrics


class ReconstructionEvaluator:
    """The ``eval`` section of a stage-1 run.

    Networks and reference are made once, before the first step: a file that is missing is found
    while it costs nothing, and later evaluations compile nothing new.

    Args:
        config: with an ``eval`` section.
        runtime: of the run.
        image_size: side of a reconstruction in pixels.
        lpips: the network of the loss, if it has one: measured with the same. It is placed with
            the loss, which must have happened before the first evaluation.

    Raises:
        UserError: there are no validation images, or a file that a metric needs is missing.
    """

    def __init__(
        self, config: RunConfig, runtime: Runtime, image_size: int, lpips: LPIPS | None
    ) -> None:
        assert config.eval is not None
        self._settings, self._runtime = config.eval, runtime
        self._workers = config.data.num_workers
        path = config.eval.data_path or config.data.val
        if path is None:
            raise UserError(
                "eval needs validation images: give eval.data_path=SHARDS or data.val=SHARDS, or "
                "train without evaluation: eval=null"
            )
        self._index = open_index(path)
        # too many: said now
        first_images(self._index, config.eval.num_images, "eval.num_images=")
        metrics = self._metrics = stage_metrics(config.eval, "stage 1")
        self._lpips = lpips
        if lpips is None and "lpips" in metrics:
            self._lpips = load_lpips(config.weights.vgg16, config.weights.lpips)
            runtime.place(self._lpips)
        self._features: FeatureNetwork | None = None
        self._reference: Reference | None = None
        self._said = False
        if "rfid" in metrics:
            others = ",".join(name for name in metrics if name != "rfid")
            without = f"eval.metrics=[{others}]" if others else "eval=null"
            network = load_inception(config.weights.inception, without)
            self._features = FeatureNetwork(network, runtime)
            if config.eval.reference_npz_path is not None:
                self._reference = load_reference(
                    config.eval.reference_npz_path, self._features, runtime, image_size
                )

    def __call__(self, rae: RAE, moved: Callable[[], None]) -> dict[str, float]:
        """Measure a placed autoencoder; every process of a run calls this together. ``moved`` is
        called after every group of images.
        """
        report = evaluate_reconstruction(
            rae,
            self._runtime,
            self._index,
            metrics=self._metrics,
            num_images=self._settings.num_images,
            batch_size=self._settings.batch_size,
            lpips=self._lpips,
            features=self._features,
            reference=self._reference,
            num_workers=self._workers,
            moved=moved,
        )
        if report.reference is not None and self._runtime.process_index == 0 and not self._said:
            tqdm.write(f"eval/rfid is against {report.reference}", file=sys.stderr)
            self._said = True
        # the originals are measured once
        self._reference = report.reference
        return dict(report.metrics)


class GenerationEvaluator:
    """The ``eval`` section of a stage-2 run; like ``ReconstructionEvaluator``, made once.

    Samples are drawn equally over the classes, without guidance: what the model itself has learned.
    They are the same picture numbers of the same seed every time, so that only the weights differ.

    Args:
        config: with an ``eval`` section.
        runtime: of the run.
        image_size: side of a sample in pixels.

    Raises:
        UserError: there is nothing to compare with, or a network cannot be had.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, image_size: int) -> None:
        assert config.eval is not None
        self._config, self._settings, self._runtime = config, config.eval, runtime
        self._image_size = image_size
        self._metrics = stage_metrics(config.eval, "stage 2")
        settings = config.eval
        reference = settings.reference_npz_path or settings.data_path or config.data.val
        if reference is None and self._metrics != ("is",):
            raise UserError(
                "eval needs images to compare with: give eval.reference_npz_path=FILE.npz, "
                "data.val=SHARDS or eval.data_path=SHARDS, or train without evaluation: eval=null"
            )
        self._networks = load_networks(
            config.weights.inception,
            config.weights.dinov2,
            runtime,
            self._metrics,
            without=lambda others: f"eval.metrics=[{','.join(others)}] or eval=null",
        )
        self._reference = None
        if reference is not None and self._metrics != ("is",):
            self._reference = load_gen_reference(
                reference,
                image_size,
                runtime,
                self._networks,
                self._metrics,
                num_images=settings.num_images,
                batch_size=settings.batch_size,
                num_workers=config.data.num_workers,
            )
            if runtime.process_index == 0:
                said = [f"evaluation is against {self._reference.named}"]
                said += [f"it leaves out {n}: {w}" for n, w in self._reference.missing.items()]
                tqdm.write("\n".join(said), file=sys.stderr)

    def __call__(
        self, sampler: ImageSampler, moved: Callable[[], None], *, lite: bool
    ) -> dict[str, float]:
        """Draw samples and measure them; every process of a run calls this together.

        Args:
            sampler: with the weights that count.
            moved: called at every step of the sampler and after every chunk of images.
            lite: draw few; the figures' names then say so.
        """
        settings = self._settings
        count = settings.lite_samples if lite else settings.num_samples
        drawn = DrawnPictures(
            sampler,
            count,
            self._image_size,
            num_classes=self._config.misc.num_classes,
            seed=self._config.training.global_seed,
            batch_size=settings.batch_size,
            moved=moved,
        )
        report = evaluate_generation(
            [drawn],
            self._runtime,
            self._networks,
            metrics=self._metrics,
            reference=self._reference,
            batch_size=settings.batch_size,
            moved=moved,
        )
        ending = LITE if lite else ""
        [(_, figures)] = report.sets
        return {f"{n}{ending}": v for n, v in figures.items() if n in self._metrics}
