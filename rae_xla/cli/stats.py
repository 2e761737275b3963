"""``rae-xla stats``: the statistics that normalise latents."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

from rae_xla.cli.options import add_config, check_out_file, read_config
from rae_xla.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config(parser)
    parser.add_argument("--data", metavar="SHARDS", help="shards to measure (data.train)")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="statistics file to write (.pt)"
    )
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="default: 256")


def run(args: argparse.Namespace) -> int:
    """Encode every image once; write ``mean`` and ``var``."""
    # the file to be written may already be named in the configuration
    config = read_config(args, "stage_1.params.normalization_stat_path=null")
    path = args.data or config.data.train
    if path is None:
        raise UserError("no data to measure: give --data SHARDS or data.train=SHARDS")
    if not isinstance(path, str):
        raise UserError(
            "data.train names several sources: give the one to measure as --data SHARDS"
        )
    if config.stage_1 is None:
        raise UserError(f"{args.config} has no stage_1 section: it names the encoder to measure")

    check_out_file(args.out)

    from rae_xla.data.shards import open_index
    from rae_xla.data.stream import one_pass
    from rae_xla.data.transforms import CenterCrop
    from rae_xla.evaluate.latent_statistics import latent_moments
    from rae_xla.interop.belonging import encoder_of, write_statistics_manifest
    from rae_xla.models.rae import RAE
    from rae_xla.models.weights import write_torch_file
    from rae_xla.progress import progress_bar
    from rae_xla.registry import instantiate
    from rae_xla.runtime import start

    index = open_index(path)
    runtime = start(config.runtime, config.mesh, seed=config.training.global_seed)
    rae = cast("RAE", instantiate(config.stage_1)).requires_grad_(False)
    encoder = encoder_of(rae, str(config.stage_1.params.get("encoder_config_path")))
    runtime.place(rae)
    parts = runtime.mesh.batch_parts
    batch_size = -(-args.batch_size // parts) * parts
    batches = one_pass(
        index,
        batch_size=batch_size,
        transform=CenterCrop(config.data.image_size),
        process_index=runtime.process_index,
        process_count=runtime.process_count,
        num_workers=config.data.num_workers,
    )
    speaks = runtime.process_index == 0
    if speaks:
        print(f"statistics of {len(index)} images on {runtime.description}")
    total = -(-len(index) // batch_size)
    moments = latent_moments(
        rae, runtime, progress_bar(batches, total=total, unit="batch", disable=not speaks)
    )
    if speaks:
        mean, var = moments.mean.float(), moments.variance.float()
        write_torch_file({"mean": mean, "var": var}, args.out)
        write_statistics_manifest(args.out, mean, var, encoder)
        print(
            f"{args.out}: {tuple(moments.mean.shape)} over {moments.count:.0f} images; "
            f"mean {moments.mean.mean():.4f}, variance {moments.variance.mean():.4f} on average"
        )
    return 0
