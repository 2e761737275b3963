"""Selectors of best-of-N: what scores the images of a prompt."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.text_to_image.latents import to_tokens
from rae_xla.models.text_to_image.slots import IMAGE_TOKEN
from rae_xla.ops.cross_entropy import IGNORE
from rae_xla.sample.answers import check_answers
from rae_xla.sample.clip import ClipScorer, clip_folder
from rae_xla.sample.images import Pixels, save_png
from rae_xla.sample.row_sampler import Latents
from rae_xla.sample.text_to_image import TextToImagePipeline

Selector = Callable[[str, Pixels, Latents], list[float]]
"""(prompt, images (N, H, W, 3), latents (N, C, h, w)) -> a score of each; larger is better."""

SELECTORS = ("lm-likelihood", "lm-yes", "clip")
COMMAND = "command:"

QUESTION = "Does this image align with the prompt: {caption}?"
"""The question of ``lm-yes``, as published."""
_YES = ("yes", "Yes", "YES", " yes", " Yes", " YES")
_NO = ("no", "No", "NO", " no", " No", " NO")


def make_selector(how: str, pipeline: TextToImagePipeline, clip: str | None = None) -> Selector:
    """Return the selector of a name.

    Args:
        how: one of ``SELECTORS``; or ``command:PROGRAM ARGUMENTS``, which gets a line of JSON with
            ``file`` and ``prompt`` for each image and prints a number for each.
        pipeline: whose images are scored; its language model reads their latents.
        clip: folder or hub id of the CLIP of ``clip``.

    Raises:
        UserError: the name is unknown, or the selector cannot run.
    """
    check_selector(how)
    if how == "clip":
        scorer = ClipScorer(clip_folder(clip), pipeline.sampler.backend.device)
        return lambda prompt, pixels, _: scorer.scores(pixels, [prompt] * len(pixels))
    if how.startswith(COMMAND):
        command = shlex.split(how.removeprefix(COMMAND))
        return lambda prompt, pixels, _: run_command(command, prompt, pixels)
    check_answers(pipeline)
    score = likelihoods if how == "lm-likelihood" else agreements
    return lambda prompt, _, latents: score(pipeline, prompt, latents)


def check_selector(how: str) -> None:
    """Raise unless a selector exists.

    Raises:
        UserError: it does not.
    """
    if how.startswith(COMMAND) and how.removeprefix(COMMAND).strip():
        return
    if how not in SELECTORS:
        raise UserError(
            f"--select {how}: give one of {', '.join(SELECTORS)}, or command:PROGRAM ARGUMENTS"
        )


def likelihoods(pipeline: TextToImagePipeline, prompt: str, latents: Latents) -> list[float]:
    """Return the mean log-likelihood of the prompt's tokens as the description of each latent."""
    tokenizer = check_answers(pipeline)
    asked = tokenizer.prompt(pipeline.question, with_image=True)
    answer = tokenizer.encode(prompt)
    logits = _logits(pipeline, [*asked, *answer], latents)
    # The token at a position is predicted at the one before it.
    predicted = logits[:, -len(answer) - 1 : -1].log_softmax(-1)
    index = torch.tensor(answer, device=logits.device).expand(len(latents), -1)[..., None]
    return predicted.gather(-1, index)[..., 0].mean(1).tolist()


def agreements(pipeline: TextToImagePipeline, prompt: str, latents: Latents) -> list[float]:
    """Return the probability of yes, rather than no, when asked whether a latent fits a prompt.

    Raises:
        UserError: the tokenizer does not distinguish yes from no.
    """
    tokenizer = check_answers(pipeline)
    yes, no = ({tokenizer.encode(word)[0] for word in words} for words in (_YES, _NO))
    yes, no = yes - no, no - yes
    if not yes or not no:
        raise UserError(
            "--select lm-yes: the tokenizer has no tokens that tell yes from no; use lm-likelihood"
        )
    asked = tokenizer.prompt(QUESTION.replace("{caption}", prompt), with_image=True)
    logits = _logits(pipeline, asked, latents)[:, -1]
    odds = logits[:, sorted(yes)].logsumexp(-1) - logits[:, sorted(no)].logsumexp(-1)
    return torch.sigmoid(odds).tolist()


def run_command(command: Sequence[str], prompt: str, pixels: Pixels) -> list[float]:
    """Return the numbers that a program prints for the images of a prompt.

    Raises:
        UserError: it fails, or prints something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i:04d}.png" for i in range(len(pixels))]
        for file, image in zip(files, pixels, strict=True):
            save_png(file, image)
        lines = [json.dumps({"file": str(file), "prompt": prompt}) + "\n" for file in files]
        shown = shlex.join(command)
        try:
            done = subprocess.run(
                list(command), input="".join(lines), capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise UserError(
                f"--select command: {shown} cannot be run ({error.strerror or error}): correct it"
            ) from error
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        raise UserError(f"--select command: {shown} failed (status {done.returncode}): {last}")
    try:
        scores = [float(word) for word in done.stdout.split()]
    except ValueError as error:
        raise UserError(f"--select command: {shown} must print numbers: {error}") from None
    if len(scores) != len(pixels) or not all(map(math.isfinite, scores)):
        raise UserError(
            f"--select command: {shown} printed {len(scores)} numbers for {len(pixels)} images: it "
            "must print one finite number for each line that it reads"
        )
    return scores


@torch.no_grad()
def _logits(pipeline: TextToImagePipeline, ids: Sequence[int], latents: Latents) -> Tensor:
    """Return the logits (N, L, vocabulary) of one text with the image of each latent."""
    sampler = pipeline.sampler
    model, device = sampler.model, sampler.backend.device
    features = to_tokens(torch.from_numpy(latents).to(device).float())[:, None]
    tokens = model.settings.tokens
    expanded = [i for token in ids for i in ([token] * (tokens if token == IMAGE_TOKEN else 1))]
    row = torch.tensor(expanded, device=device).expand(len(latents), -1)
    labels = torch.full_like(row, IGNORE)  # nothing is an answer: the image is context
    with sampler.backend.autocast():
        embeddings = model.embed(row, features, model.slots(row, labels, 1))
        hidden = model.language_model(embeddings)
        first = expanded.index(IMAGE_TOKEN) + tokens  # the text after the image is enough
        return (hidden[:, first:] @ model.language_model.output_weight.T).float()
