"""Evaluation while training: reconstructions of the validation images, at their own cadence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from tqdm import tqdm

from rae_xla.data.shards import open_index
from rae_xla.errors import UserError
from rae_xla.evaluate.inception import FeatureNetwork, load_inception
from rae_xla.evaluate.reconstruction import evaluate_reconstruction, first_images
from rae_xla.evaluate.reference import Reference, load_reference
from rae_xla.models.lpips import LPIPS, load_lpips
from rae_xla.models.rae import RAE
from rae_xla.runtime import Runtime

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


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
        metrics = config.eval.metrics
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
            metrics=self._settings.metrics,
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
