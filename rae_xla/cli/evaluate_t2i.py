"""``rae-xla evaluate t2i``: measure images of prompts, and text-to-image checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rae_xla.cli.evaluate_gen import measure_sets, print_report
from rae_xla.cli.evaluation_output import provenance, write_json
from rae_xla.cli.options import PathAction, check_out_file, read_config, start_backend
from rae_xla.config.inputs import input_paths
from rae_xla.config.paths import LOCAL
from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.evaluate.generation import GenReport
    from rae_xla.evaluate.image_sets import ImageSet
    from rae_xla.runtime import Backend
    from rae_xla.sample.clip import ClipScorer
    from rae_xla.sample.prompted_images import PromptedImage
    from rae_xla.train.evaluate_text_to_image import ValidationReport

_CLIP, _LOSS = "clip_score", "validation_loss"
_COMPARING = ("fid", "sfid", "precision", "recall", "fd_dinov2")
"""Metrics of ``evaluate gen`` that assume no ImageNet classes, unlike the Inception Score."""

T2I_METRICS = (_CLIP, *_COMPARING, _LOSS)


def add_t2i_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that only ``evaluate t2i`` has."""
    parser.add_argument_group("t2i").add_argument(
        "--clip",
        action=PathAction,
        rule=LOCAL,
        metavar="FOLDER",
        help="CLIP of clip_score: a folder in the format of transformers, with its processor",
    )


def evaluate_t2i(args: argparse.Namespace) -> int:
    """Measure sets of images of prompts and a checkpoint, print tables and write the report."""
    metrics = _metrics(args)
    comparing = tuple(metric for metric in metrics if metric in _COMPARING)
    _check_options(args, metrics, comparing)
    samples = [Path(path) for path in args.samples or ()]
    config, source = _config_and_source(args) if _LOSS in metrics else (read_config(args), "")
    given = [args.config, args.reference, args.ckpt, args.data, args.clip, *map(str, samples)]
    check_out_file(args.out, inputs=[*given, *input_paths(config)])

    from rae_xla.evaluate.generation import check_sets
    from rae_xla.evaluate.image_sets import open_images
    from rae_xla.evaluate.references import check_generation_reference
    from rae_xla.sample.clip import ClipScorer, check_clip
    from rae_xla.sample.prompted_images import read_prompted_images
    from rae_xla.sample.sample_set import replicated_mesh

    if _CLIP in metrics:
        check_clip(Path(args.clip))
    prompted = [read_prompted_images(folder) for folder in samples]
    sets = [open_images(folder, args.num_images) for folder in samples]
    if sets:
        check_sets(sets, metrics)
    if comparing:
        check_generation_reference(args.reference, sets[0].side)
    backend = start_backend(config, mesh=replicated_mesh(config.mesh))
    scorer = ClipScorer(args.clip, backend.device) if _CLIP in metrics else None
    report = validation = None
    if sets:
        report = _measure(args, config, backend, sets, prompted, scorer, comparing)
    if _LOSS in metrics:
        from rae_xla.train.evaluate_text_to_image import evaluate_text_to_image

        first = backend.process_index == 0
        part = args.weights or "ema"
        validation = evaluate_text_to_image(config, backend, source, part, progress=first)
    if backend.process_index == 0:
        content = _print_and_describe(report, validation, backend)
        content |= provenance(args, config, backend, metrics)
        if scorer is not None:
            content["weights"]["clip"] = f"{args.clip} (sha256 {scorer.sha256()})"
        if args.out is not None:
            write_json(args.out, content)
            print(args.out)
    return 0


def _metrics(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the requested metrics; by default those that the options allow."""
    if args.metrics:
        if unknown := [name for name in args.metrics if name not in T2I_METRICS]:
            raise UserError(f"--metrics {unknown[0]}: evaluate t2i has {' '.join(T2I_METRICS)}")
        return tuple(dict.fromkeys(args.metrics))
    metrics = [_CLIP] if args.clip else []
    metrics += [name for name in _COMPARING if args.reference and name != "fd_dinov2"]
    metrics += [_LOSS] if args.ckpt else []
    if args.samples and metrics in ([], [_LOSS]):
        from rae_xla.sample.clip import missing_clip

        raise missing_clip(
            "--samples was given without --clip, and without --reference SHARDS for fid"
        )
    if not metrics:
        raise UserError(
            "evaluate t2i needs --samples FOLDER with --clip FOLDER or --reference SHARDS, to "
            "measure images, or --ckpt PATH, to measure the validation loss of a run"
        )
    return tuple(metrics)


def _check_options(
    args: argparse.Namespace, metrics: Sequence[str], comparing: Sequence[str]
) -> None:
    """Raise if a metric lacks an option, or an option has no metric."""
    images = [metric for metric in metrics if metric != _LOSS]
    if images and args.samples is None:
        raise UserError(
            f"{images[0]} needs --samples FOLDER: images of `rae-xla sample --prompts` or "
            "`rae-xla generate --prompts`"
        )
    if _LOSS in metrics and args.ckpt is None:
        raise UserError(
            f"{_LOSS} needs --ckpt PATH: a results folder of `rae-xla train t2i`, or one of its "
            "checkpoints"
        )
    if _CLIP in metrics and args.clip is None:
        from rae_xla.sample.clip import missing_clip

        raise missing_clip(f"{_CLIP} is requested without --clip")
    if comparing and args.reference is None:
        raise UserError(
            f"{comparing[0]} needs --reference SHARDS: captioned images to compare with, or an "
            ".npz file of images (arr_0) or moments (mu, sigma)"
        )
    used = {
        "clip": _CLIP in metrics,
        "reference": bool(comparing),
        "reference_name": bool(comparing),
        "samples": bool(images),
        "ckpt": _LOSS in metrics,
        "weights": _LOSS in metrics,
        "data": _LOSS in metrics,
    }
    for name, is_used in used.items():
        if getattr(args, name) is not None and not is_used:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} is not used by --metrics {' '.join(metrics)}: remove it, or request a "
                "metric that uses it"
            )


def _config_and_source(args: argparse.Namespace) -> tuple[RunConfig, str]:
    """Return the configuration of the validation loss, and the model that is measured."""
    from rae_xla.config.training_schema import EvalConfig
    from rae_xla.interop.text_to_image import is_published_folder
    from rae_xla.models.pretrained.published_text_to_image import TEXT_TO_IMAGE
    from rae_xla.sample.text_to_image_lookup import resolve_text_to_image

    if args.config is not None:
        config = read_config(args)
    elif args.ckpt in TEXT_TO_IMAGE or is_published_folder(args.ckpt):
        raise UserError(
            f"--ckpt {args.ckpt} is not a run, so that nothing says how captions become its rows: "
            "give --config FILE of a text-to-image run, too"
        )
    else:
        config = resolve_text_to_image(args.ckpt, args.overrides).config
    settings = config.eval or EvalConfig()
    data = args.data or settings.data_path or config.data.val
    if data is None:
        raise UserError(f"{_LOSS} needs held-back captions: give --data SHARDS, or data.val=SHARDS")
    settings = replace(
        settings,
        data_path=data,
        num_images=args.num_images or settings.num_images,
        batch_size=args.batch_size or settings.batch_size,
    )
    return replace(config, eval=settings), args.ckpt


def _measure(
    args: argparse.Namespace,
    config: RunConfig,
    backend: Backend,
    sets: Sequence[ImageSet],
    prompted: Sequence[Sequence[PromptedImage]],
    scorer: ClipScorer | None,
    comparing: tuple[str, ...],
) -> GenReport:
    """Measure sets with CLIP and against the reference."""
    from rae_xla.evaluate.generation import GenReport
    from rae_xla.evaluate.prompt_alignment import clip_score, cut_prompts_warning, with_clip_scores

    if comparing:
        report = measure_sets(args, config, backend, sets, comparing)
    else:
        empty = tuple((images.name, dict[str, float]()) for images in sets)
        report = GenReport(empty, sets[0].count, sets[0].side, None, {})
    if scorer is None:
        return report
    scores = {}
    for images, listed in zip(sets, prompted, strict=True):
        scores[images.name] = clip_score(listed[: images.count], scorer, backend, progress=True)
    return with_clip_scores(report, scores, cut_prompts_warning(prompted[0], scorer))


def _print_and_describe(
    report: GenReport | None, validation: ValidationReport | None, backend: Backend
) -> dict[str, Any]:
    """Print the tables, and return the content of the JSON report."""
    content: dict[str, Any] = {"metrics": {}, "warnings": []}
    if report is not None:
        print_report(report, backend)
        content = report.describe()
    if validation is not None:
        print(f"validation losses of {validation.checkpoint} ({validation.weights})")
        print(f"{validation.images} samples of {validation.data}, on {backend.description}")
        for name, value in validation.losses.items():
            print(f"  {name:<18} {value:11.6f}")
            entry = {"value": value, "spread": None, "unit": None, "images": validation.images}
            content["metrics"][name] = entry
        content["validation"] = validation.describe()
    return content
