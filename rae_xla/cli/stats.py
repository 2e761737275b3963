"""``rae-xla stats``: compute the latent statistics for normalisation."""

from __future__ import annotations

import argparse
import logging
from typing import cast

from rae_xla.cli.options import (
    NumberAction,
    PathAction,
    add_config,
    check_out_file,
    read_config,
    start_backend,
)
from rae_xla.config.inputs import input_paths
from rae_xla.config.ranges import COUNT
from rae_xla.errors import UserError

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config(parser)
    parser.add_argument(
        "--data",
        action=PathAction,
        metavar="SHARDS",
        help="shards to encode (default: data.train)",
    )
    parser.add_argument(
        "--out",
        action=PathAction,
        required=True,
        metavar="FILE",
        help="statistics file to write (.pt), local or gs://",
    )
    parser.add_argument(
        "--batch-size",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        default=256,
        metavar="N",
        help="default: 256",
    )


def run(args: argparse.Namespace) -> int:
    """Encode every image once, and write ``mean`` and ``var`` of the latents."""
    # The configuration may already name the file that this command writes.
    config = read_config(args, "stage_1.params.normalization_stat_path=null")
    path = args.data or config.data.train
    if path is None:
        raise UserError("no data: give --data SHARDS or data.train=SHARDS")
    if not isinstance(path, str):
        raise UserError("data.train names several sources: give one of them as --data SHARDS")
    if config.stage_1 is None:
        raise UserError(f"{args.config} has no stage_1 section: add it, to name the encoder")

    check_out_file(args.out, inputs=[args.config, path, *input_paths(config)])

    from rae_xla.checkpoint.provenance import encoder_part, write_statistics_manifest
    from rae_xla.data.loader import one_pass
    from rae_xla.data.shards.index import open_index
    from rae_xla.data.transforms import CenterCrop
    from rae_xla.evaluate.latent_statistics import latent_moments
    from rae_xla.interop.instantiate import instantiate
    from rae_xla.models.rae import RAE
    from rae_xla.models.weights import write_torch_file
    from rae_xla.progress import progress_bar
    from rae_xla.runtime.data_workers import worker_count
    from rae_xla.storage.staging import staged_output

    index = open_index(path)
    backend = start_backend(config)
    rae = cast("RAE", instantiate(config.stage_1)).requires_grad_(False)
    encoder = encoder_part(rae, str(config.stage_1.params.get("encoder_config_path")))
    backend.place(rae)
    parts = backend.mesh.batch_shards
    batch_size = -(-args.batch_size // parts) * parts
    batches = one_pass(
        index,
        batch_size=batch_size,
        transform=CenterCrop(config.data.image_size),
        process_index=backend.process_index,
        process_count=backend.process_count,
        num_workers=worker_count(backend, config.data.num_workers),
    )
    is_first = backend.process_index == 0
    logger.info("statistics of %d images on %s", len(index), backend.description)
    total = -(-len(index) // batch_size)
    moments = latent_moments(
        rae, backend, progress_bar(batches, total=total, unit="batch", disable=not is_first)
    )
    if is_first:
        mean, var = moments.mean.float(), moments.variance.float()
        with staged_output(args.out) as out:
            write_torch_file({"mean": mean, "var": var}, out)
            write_statistics_manifest(out, mean, var, encoder)
        print(
            f"{args.out}: {tuple(moments.mean.shape)} over {moments.count:.0f} images; "
            f"mean {moments.mean.mean():.4f}, variance {moments.variance.mean():.4f} on average"
        )
    return 0
