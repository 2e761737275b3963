"""Best of N: generate several images of each prompt and keep those with the best scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rae_xla import storage
from rae_xla.config.paths import StoragePath
from rae_xla.sample.generated_folder import IMAGES_KEY, LISTING_FILE
from rae_xla.sample.images import save_png
from rae_xla.sample.prompts import Prompt
from rae_xla.sample.sample_set import claim_folder
from rae_xla.sample.selectors import Selector
from rae_xla.sample.text_to_image import TextToImagePipeline, describe_sampling

SCORES_FOLDER = "scores"
"""Folder of the scores of each prompt; a prompt with scores is complete."""


@dataclass(frozen=True)
class BestOf:
    """What is generated and what is kept.

    Attributes:
        prompts: of the images.
        kept: images of each prompt that are kept.
        candidates: images that are generated for each one that is kept.
        select: name of the selector, for the manifest.
        seed: of the noise.
    """

    prompts: Sequence[Prompt]
    kept: int
    candidates: int
    select: str
    seed: int


def write_best_of(
    out: StoragePath,
    pipeline: TextToImagePipeline,
    selector: Selector,
    choice: BestOf,
    *,
    batch_size: int,
    on_prompt: Callable[[int], None] = lambda done: None,
) -> None:
    """Generate and score the images that a folder lacks, and write the manifest of all.

    ``00000-0.png`` is the best image of the first prompt. An interrupted call is resumed at the
    next prompt. All processes must call it; process 0 writes.

    Args:
        out: the folder, local or ``gs://``.
        pipeline: generates the images.
        selector: scores them.
        choice: what is generated.
        batch_size: images at a time.
        on_prompt: called with the number of complete prompts.

    Raises:
        UserError: the folder has images of other settings.
    """
    backend = pipeline.sampler.backend
    settings = describe_sampling(pipeline, choice.seed) | {
        "best_of": choice.candidates,
        "select": choice.select,
        "images_per_prompt": choice.kept,
        "prompts": [[prompt.name, prompt.text] for prompt in choice.prompts],
    }
    scores = out / SCORES_FOLDER

    def complete() -> list[str]:
        names = storage.list_files(scores) if storage.exists(scores) else {}
        return sorted(name for name in names if name.endswith(".json"))

    claim_folder(out, settings, backend, lambda old: bool(complete()), ours=bool(complete()))
    first = backend.process_index == 0
    done = json.loads(backend.all_gather_text(json.dumps(complete()) if first else "")[0])
    if first:
        storage.make_folder(scores)
    on_prompt(len(done))
    for number, prompt in enumerate(choice.prompts):
        if _record_name(number) in done:
            continue
        count = choice.kept * choice.candidates
        pixels, latents = pipeline.generate_numbered(
            [prompt.text] * count,
            range(count),
            seed=choice.seed,
            batch_size=batch_size,
            keep_latents=True,
        )
        assert latents is not None
        found = selector(prompt.text, pixels, latents)
        # Equal scores are ranked by number.
        order = np.argsort(-np.asarray(found), kind="stable").tolist()
        if first:
            for rank, candidate in enumerate(order[: choice.kept]):
                save_png(out / _image_name(number, rank), pixels[candidate])
            record = [
                {"number": i, "score": found[i], "rank": rank} for rank, i in enumerate(order)
            ]
            content = (json.dumps(record) + "\n").encode()
            storage.write_bytes(scores / _record_name(number), content)
        done.append(_record_name(number))
        on_prompt(len(done))
    if first:
        listing = settings | {IMAGES_KEY: _listed_images(scores, choice)}
        storage.write_bytes(out / LISTING_FILE, (json.dumps(listing, indent=1) + "\n").encode())


def _listed_images(scores: StoragePath, choice: BestOf) -> list[dict[str, Any]]:
    """Return the entries of the manifest: the images that are kept, and all scores."""
    images = []
    for number, prompt in enumerate(choice.prompts):
        record = json.loads(storage.read_bytes(scores / _record_name(number)))
        for entry in record[: choice.kept]:
            shown = {"label": number, "class": prompt.text, "prompt": prompt.text}
            file = {"file": _image_name(number, entry["rank"])}
            more = {"seed": choice.seed, "candidates": record} if entry["rank"] == 0 else {}
            images.append(file | shown | entry | {"seed": choice.seed} | more)
    return images


def _image_name(prompt: int, rank: int) -> str:
    return f"{prompt:05d}-{rank}.png"


def _record_name(prompt: int) -> str:
    return f"{prompt:05d}.json"
