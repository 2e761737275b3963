"""``rae-xla evaluate``: measure reconstructions or generated images, or compare decoders."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rae_xla import storage
from rae_xla.cli.evaluate_t2i import T2I_METRICS, add_t2i_options, evaluate_t2i
from rae_xla.cli.evaluation_output import print_warnings, provenance, write_json
from rae_xla.cli.options import (
    NumberAction,
    PathAction,
    add_config,
    check_not_an_input,
    check_out_file,
    check_out_folder,
    move_settings_to_overrides,
    read_config,
    start_backend,
)
from rae_xla.config.inputs import input_paths
from rae_xla.config.paths import ANYWHERE, LOCAL, parse_path
from rae_xla.config.ranges import COUNT
from rae_xla.config.validation import GEN_METRICS, RECON_METRICS
from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.evaluate.feature_networks import FeatureNetwork
    from rae_xla.models.lpips import LPIPS
    from rae_xla.models.rae import RAE
    from rae_xla.runtime import Backend

METRICS = {
    "recon": RECON_METRICS,
    "gen": GEN_METRICS,
    "t2i": T2I_METRICS,
    "decoders": ("psnr", "fid"),
}

OPTION_SCOPES = {
    "ckpt": ("recon", "t2i"),
    "weights": ("recon", "t2i"),
    "data": ("recon", "t2i"),
    "num_images": ("recon", "gen", "t2i"),
    "batch_size": ("recon", "gen", "t2i"),
    "samples": ("gen", "t2i"),
    "clip": ("t2i",),
    "reference_name": ("gen", "t2i"),
    "fdr6_reference": ("gen",),
    "latents": ("decoders",),
    "decoders": ("decoders",),
}
"""Options that apply to some evaluations only."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "what",
        choices=tuple(METRICS),
        help="recon: PSNR, SSIM, LPIPS and rFID of reconstructions; gen: FID, sFID, Inception "
        "Score, precision and recall of generated images; t2i: CLIPScore and FID of images of "
        "prompts, and validation losses of a run; decoders: gFID of the same latents through "
        "several decoders",
    )
    add_config(parser, required=False)
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="recon: psnr ssim lpips rfid; gen: fid sfid is precision recall fd_dinov2 fdr6; "
        "t2i: clip_score fid sfid precision recall fd_dinov2 validation_loss; decoders: psnr fid "
        "(default: all that the options allow, except fd_dinov2 and fdr6)",
    )
    parser.add_argument(
        "--reference",
        action=PathAction,
        metavar="FILE.npz",
        help="reference of FID: images (arr_0), or moments (mu and sigma); for gen and t2i also a "
        "folder of shards (default for recon: the originals)",
    )
    parser.add_argument(
        "--out",
        action=PathAction,
        metavar="PATH",
        help="JSON file of the report; decoders: folder of report.json and grid.png",
    )
    several = parser.add_argument_group("recon, gen, t2i")
    several.add_argument(
        "--num-images",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        metavar="N",
        help="measure the first N images (default: all)",
    )
    several.add_argument(
        "--batch-size",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        metavar="N",
        help="images in flight (default: 64)",
    )
    recon = parser.add_argument_group("recon, t2i")
    recon.add_argument(
        "--ckpt",
        action=PathAction,
        metavar="PATH",
        help="checkpoint or results folder of stage 1 (default: the weights that stage_1 names), "
        "or of `rae-xla train t2i`",
    )
    recon.add_argument(
        "--weights", choices=("ema", "model"), help="which weights of --ckpt (default: ema)"
    )
    recon.add_argument(
        "--data",
        action=PathAction,
        metavar="SHARDS",
        help="shards to reconstruct, or of held-back captions (default: data.val)",
    )
    gen = parser.add_argument_group("gen, t2i")
    gen.add_argument(
        "--samples",
        nargs="+",
        metavar="PATH",
        help=".npz files (arr_0), or folders of images or tar files; several, such as sets of "
        "several seeds, give mean and standard deviation",
    )
    gen.add_argument(
        "--reference-name",
        metavar="NAME",
        help="name of the reference statistics in the report, such as ADM or JiT (default: that of "
        "a file with a published name)",
    )
    gen.add_argument(
        "--fdr6-reference",
        action=PathAction,
        rule=LOCAL,
        metavar="FOLDER",
        help="the six files of nanovisionx/nanogen-evals-stats (default: images of --reference)",
    )
    add_t2i_options(parser)
    decoders = parser.add_argument_group("decoders")
    decoders.add_argument(
        "--latents",
        action=PathAction,
        rule=LOCAL,
        metavar="FILE",
        help="latents.npy that `rae-xla sample --keep-latents` wrote",
    )
    decoders.add_argument(
        "--decoders",
        nargs="+",
        metavar="FILE",
        help="decoder weights, from `rae-xla checkpoints export --what decoder`",
    )


def run(args: argparse.Namespace) -> int:
    """Compute metrics, print a table and write the report."""
    for name in ("metrics", "samples", "decoders"):
        move_settings_to_overrides(args, name)
    for name, rule in (("samples", LOCAL), ("decoders", ANYWHERE)):
        if (paths := getattr(args, name)) is not None:
            setattr(args, name, [parse_path(path, f"--{name}", rule) for path in paths])
    for name, scopes in OPTION_SCOPES.items():
        if getattr(args, name) is not None and args.what not in scopes:
            verbs = " and ".join(f"`rae-xla evaluate {scope}`" for scope in scopes)
            raise UserError(f"--{name.replace('_', '-')} applies to {verbs}, not {args.what}")
    if args.what == "t2i":
        return evaluate_t2i(args)
    default = [name for name in METRICS[args.what] if name not in ("fd_dinov2", "fdr6")]
    metrics = tuple(dict.fromkeys(args.metrics or default))
    unknown = [name for name in metrics if name not in METRICS[args.what]]
    if unknown:
        known = " ".join(METRICS[args.what])
        raise UserError(f"--metrics {unknown[0]}: evaluate {args.what} has {known}")
    if args.what == "gen":
        from rae_xla.cli.evaluate_gen import evaluate_gen

        return evaluate_gen(args, metrics)
    if args.config is None:
        raise UserError(
            f"evaluate {args.what} needs --config FILE, which describes the autoencoder"
        )
    return _recon(args, metrics) if args.what == "recon" else _decoders(args, metrics)


def _recon(args: argparse.Namespace, metrics: tuple[str, ...]) -> int:
    if args.weights and args.ckpt is None:
        raise UserError("--weights selects weights of a checkpoint: give --ckpt too")
    if args.reference and "rfid" not in metrics:
        raise UserError("--reference is used only by rfid: add rfid to --metrics")
    _check_reference_file(args.reference)
    config = read_config(args)
    given = [args.config, args.reference, args.ckpt, args.data]
    check_out_file(args.out, inputs=[*given, *input_paths(config)])
    path = args.data or config.data.val
    if path is None:
        raise UserError("no images to reconstruct: give --data SHARDS or data.val=SHARDS")

    from rae_xla.data.shards.writer import open_index
    from rae_xla.evaluate.image_sets import first_images
    from rae_xla.evaluate.reconstruction import UNITS, evaluate_reconstruction
    from rae_xla.evaluate.references import load_fid_reference
    from rae_xla.runtime.data_workers import worker_count

    index = open_index(path)
    first_images(index, args.num_images)  # report too large a number before anything is loaded
    backend = start_backend(config)
    rae, checkpoint = _load_rae(config, args)
    lpips = _load_lpips(config, backend, metrics) if "lpips" in metrics else None
    features = _load_features(config, backend, "rfid", metrics) if "rfid" in metrics else None
    backend.place(rae)
    reference = None
    if args.reference is not None and features is not None:
        reference = load_fid_reference(args.reference, features, backend, rae.image_size)
    report = evaluate_reconstruction(
        rae,
        backend,
        index,
        metrics=metrics,
        num_images=args.num_images,
        batch_size=64 if args.batch_size is None else args.batch_size,
        lpips=lpips,
        features=features,
        reference=reference,
        num_workers=worker_count(backend, config.data.num_workers),
        progress=backend.process_index == 0,
    )
    if backend.process_index != 0:
        return 0
    print(f"reconstructions of {report.images}, {report.image_size} pixels a side")
    print(f"weights: {checkpoint}; on {backend.description}")
    for name, value in report.metrics.items():
        print(f"  {name:<6} {value:12.6f} {UNITS.get(name, ''):<3} {report.num_images} images")
    if report.reference is not None:
        print(f"rfid against {report.reference}")
    print_warnings(report.warnings)
    if args.out is not None:
        content = report.describe() | {"checkpoint": checkpoint}
        write_json(args.out, content | provenance(args, config, backend, metrics))
        print(args.out)
    return 0


def _decoders(args: argparse.Namespace, metrics: tuple[str, ...]) -> int:
    for name in ("latents", "decoders"):
        if getattr(args, name) is None:
            raise UserError(f"evaluate decoders needs --{name}")
    if "fid" in metrics and args.reference is None:
        raise UserError(
            "fid needs --reference FILE.npz: images (arr_0) or moments (mu, sigma) of the data set "
            "that the model was trained on; or omit it: --metrics psnr"
        )
    if args.reference is not None and "fid" not in metrics:
        raise UserError("--reference is used only by fid: add fid to --metrics")
    _check_reference_file(args.reference)
    if args.out is not None:
        check_not_an_input(args.out, [storage.split(args.latents)[0]])  # has a grid, too
        check_out_folder(args.out)
    config = read_config(args)

    from rae_xla.evaluate.decoders import compare_decoders, load_decoders, open_latents
    from rae_xla.evaluate.references import load_fid_reference
    from rae_xla.sample.images import save_png

    backend = start_backend(config)
    rae = _build_rae(config, args, without_decoder=True)
    latents = open_latents(Path(args.latents), rae)
    if "fid" in metrics and len(latents) < 2:
        raise UserError(
            f"fid of {len(latents)} latent: a covariance needs at least two; keep more latents"
        )
    decoders = load_decoders(rae, args.decoders)
    features = _load_features(config, backend, "fid", metrics) if "fid" in metrics else None
    backend.place(rae)
    for decoder in decoders.values():
        backend.place(decoder)
    reference = None
    if features is not None:
        reference = load_fid_reference(args.reference, features, backend, rae.image_size)
    report = compare_decoders(
        rae, backend, latents, decoders, args.decoders, features=features, reference=reference
    )
    if backend.process_index != 0:
        return 0
    print(f"{report.num_images} latents of {args.latents} on {backend.description}")
    width = max(len("decoder"), *(len(result.name) for result in report.results))
    print(f"  {'decoder':<{width}}  {'fid':>12}  {'psnr to the first':>17}")
    for number, result in enumerate(report.results):
        fid = "-" if result.fid is None else f"{result.fid:.6f}"
        ratio = f"{result.psnr_to_first:.4f} dB" if number else "-"
        print(f"  {result.name:<{width}}  {fid:>12}  {ratio:>17}")
    if report.reference is not None:
        print(f"fid against {report.reference}")
    print_warnings(report.warnings)
    if args.out is not None:
        save_png(args.out / "grid.png", report.grid)
        content = report.describe() | {"latents": str(args.latents)}
        content |= provenance(args, config, backend, metrics)
        write_json(args.out / "report.json", content)
        print(args.out)
    return 0


def _check_reference_file(reference: str | None) -> None:
    """Report a missing reference before anything is loaded or downloaded."""
    if reference is not None and storage.is_remote(reference):
        raise UserError(f"--reference {reference}: gs:// is not supported here: copy it to a disk")
    if reference is not None and not Path(reference).is_file():
        raise UserError(f"reference {reference}: there is no such file; correct --reference")


def _build_rae(config: RunConfig, args: argparse.Namespace, *, without_decoder: bool) -> RAE:
    """Build the autoencoder of ``stage_1`` on the host.

    Args:
        config: the run's configuration.
        args: the command line, for error messages.
        without_decoder: leave the decoder's weights random; the caller loads others.
    """
    from rae_xla.interop.instantiate import instantiate

    if config.stage_1 is None:
        raise UserError(
            f"{args.config} has no stage_1 section: add it, to describe the autoencoder"
        )
    spec = config.stage_1
    if without_decoder:
        params = {**spec.params, "pretrained_decoder_path": None}
        spec = replace(spec, params=params, ckpt=None)
    elif spec.ckpt is None and spec.params.get("pretrained_decoder_path") is None:
        raise UserError(
            f"{args.config} names no decoder weights, and metrics of random ones are meaningless: "
            "give --ckpt PATH, stage_1.ckpt=FILE or stage_1.params.pretrained_decoder_path=FILE"
        )
    return cast("RAE", instantiate(spec)).requires_grad_(False)


def _load_rae(config: RunConfig, args: argparse.Namespace) -> tuple[RAE, str]:
    """Load the autoencoder; return it and the source of its weights."""
    if args.ckpt is None:
        rae = _build_rae(config, args, without_decoder=False)
        assert config.stage_1 is not None
        source = config.stage_1.ckpt or config.stage_1.params["pretrained_decoder_path"]
        return rae, f"{source}"

    from rae_xla.checkpoint.tensors import find_weights, open_weights
    from rae_xla.models.pretrained.selected_weights import select_weights
    from rae_xla.models.weights import load_strict

    path, which = find_weights(args.ckpt, "--ckpt"), args.weights or "ema"
    selected = select_weights(open_weights(path, "--ckpt"), f"--ckpt {path}", which)
    bare = selected.part is None
    if bare and args.weights:
        raise UserError(
            f"--ckpt {path} is a bare state dict without {which} weights: omit --weights"
        )
    rae = _build_rae(config, args, without_decoder=True)
    load_strict(rae, selected.state, f"--ckpt {path}")
    return rae, f"{path}" if bare else f"{path} ({which})"


def _load_lpips(config: RunConfig, backend: Backend, metrics: tuple[str, ...]) -> LPIPS:
    from rae_xla.models.lpips import load_lpips

    try:
        lpips = load_lpips(config.weights.vgg16, config.weights.lpips)
    except UserError as error:
        raise UserError(f"{error}; to omit the metric: {_without('lpips', metrics)}") from error
    return cast("LPIPS", backend.place(lpips.eval()))


def _load_features(
    config: RunConfig, backend: Backend, name: str, metrics: tuple[str, ...]
) -> FeatureNetwork:
    from rae_xla.evaluate.feature_networks import FeatureNetwork
    from rae_xla.evaluate.inception import load_inception

    network = load_inception(config.weights.inception, _without(name, metrics))
    return FeatureNetwork(network, backend)


def _without(name: str, metrics: tuple[str, ...]) -> str:
    """Return the option that requests all metrics but one."""
    return f"--metrics {' '.join(metric for metric in metrics if metric != name) or 'psnr'}"
