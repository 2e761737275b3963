"""``rae-xla generate --prompt``: images from prompts."""

from __future__ import annotations

import argparse
import logging

from rae_xla.cli.prompt_options import resolve
from rae_xla.errors import UserError

logger = logging.getLogger(__name__)


def generate_from_prompts(args: argparse.Namespace) -> int:
    """Generate images of prompts and write them."""
    if args.smoke:
        raise UserError("--smoke is a test with a class-conditional model: leave out the prompts")
    if args.class_names:
        raise UserError("--class-names is for class-conditional models: leave it out")

    from rae_xla.progress import log_only_on_first_process, progress_bar
    from rae_xla.sample.pipeline import sampling_overrides
    from rae_xla.sample.prompts import Prompt, check_prompts, read_prompts

    if args.prompts:
        prompts = read_prompts(args.prompts)
    else:
        check_prompts(args.prompt)
        prompts = [Prompt(text, f"{i:05d}") for i, text in enumerate(args.prompt)]
    count = 1 if args.num_samples is None else args.num_samples
    settings = sampling_overrides(args.cfg_scale, args.num_steps, args.mode)
    resolved = resolve(args, settings)
    if args.best_of is not None:
        from rae_xla.cli.generate_best_of import generate_best_of

        return generate_best_of(args, resolved, prompts, count)
    if args.select or args.clip:
        raise UserError("--select and --clip need --best-of N: give it, or leave them out")

    from rae_xla.sample.generated_folder import GRID_FILE, write_generated_folder
    from rae_xla.sample.text_to_image import build_text_to_image_pipeline, describe_sampling

    pipeline = build_text_to_image_pipeline(resolved)
    backend = pipeline.sampler.backend
    log_only_on_first_process(backend.process_index)
    first = backend.process_index == 0
    texts = [prompt.text for prompt in prompts]
    logger.info("%d images, on %s", count * len(texts), backend.description)
    with progress_bar(desc="sampling", unit="step", disable=not first) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        pixels, latents = pipeline.generate(
            texts,
            count,
            seed=args.seed,
            batch_size=args.batch_size,
            progress=report,
            keep_latents=args.save_latents,
        )
    if first:
        write_generated_folder(
            args.out,
            pixels,
            [number for number in range(len(texts)) for _ in range(count)],
            texts,
            describe_sampling(pipeline, args.seed),
            details=[
                {"prompt": prompt.text, "number": i, "seed": args.seed}
                for prompt in prompts
                for i in range(count)
            ],
            latents=latents,
        )
        print(f"{args.out}: {len(pixels)} PNGs and {GRID_FILE}")
    return 0
