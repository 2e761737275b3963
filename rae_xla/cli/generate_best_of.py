"""``rae-xla generate --best-of N``: keep the best of several images of each prompt."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.sample.prompts import Prompt
    from rae_xla.sample.text_to_image_lookup import ResolvedTextToImage


def generate_best_of(
    args: argparse.Namespace, resolved: ResolvedTextToImage, prompts: Sequence[Prompt], kept: int
) -> int:
    """Generate, score and select images of prompts."""
    from rae_xla.config.paths import StoragePath
    from rae_xla.progress import log_only_on_first_process, progress_bar
    from rae_xla.sample.best_of import BestOf, write_best_of
    from rae_xla.sample.selectors import check_selector, make_selector
    from rae_xla.sample.text_to_image import build_text_to_image_pipeline

    select = args.select or "lm-likelihood"
    check_selector(select)
    if args.save_latents:
        raise UserError("--save-latents is not available with --best-of: leave it out")
    if args.clip and select != "clip":
        raise UserError("--clip belongs to --select clip: leave it out")
    pipeline = build_text_to_image_pipeline(resolved)
    backend = pipeline.sampler.backend
    log_only_on_first_process(backend.process_index)
    selector = make_selector(select, pipeline, args.clip)
    first = backend.process_index == 0
    choice = BestOf(prompts, kept, args.best_of, select, args.seed)
    with progress_bar(total=len(prompts), unit="prompt", disable=not first) as bar:

        def report(done: int) -> None:
            bar.update(done - bar.n)

        write_best_of(
            StoragePath(args.out),
            pipeline,
            selector,
            choice,
            batch_size=args.batch_size,
            on_prompt=report,
        )
    if first:
        print(f"{args.out}: {kept * len(prompts)} PNGs, the best of {args.best_of}")
    return 0
