"""Answers about images: the language model of a text-to-image model reads an image or a latent."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rae_xla import storage
from rae_xla.data.conversations import ConversationTokenizer
from rae_xla.data.image_decoding import ImageError, decode_rgb
from rae_xla.data.image_finder import ImageNotes
from rae_xla.errors import UserError
from rae_xla.models.rae import RAE
from rae_xla.models.text_to_image.generation import ChooseToken, StopTokens, generate, most_likely
from rae_xla.models.text_to_image.latents import to_tokens
from rae_xla.ops.dispatch import requires_static_graph
from rae_xla.sample.images import to_unit
from rae_xla.sample.text_to_image import TextToImagePipeline


@dataclass(frozen=True)
class TokenSampling:
    """How the tokens of an answer are chosen.

    Attributes:
        temperature: of the distribution; 0: the most likely token.
        top_p: only the most likely tokens that together have this probability.
        seed: of the random numbers.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"the temperature is {self.temperature:g}: give 0 for the most likely answer, or a "
                "number such as 0.7"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p:g}: give a probability above 0, at most 1")

    def chooser(self) -> ChooseToken:
        """Return what chooses the tokens of one answer."""
        if self.temperature == 0:
            return most_likely
        generator = torch.Generator().manual_seed(self.seed)

        def choose(logits: Tensor) -> Tensor:
            probabilities = (logits.float().cpu() / self.temperature).softmax(-1)
            ordered, order = probabilities.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            ordered = torch.where(before < self.top_p, ordered, 0.0)
            chosen = torch.multinomial(ordered, 1, generator=generator)
            return order.gather(-1, chosen)[:, 0].to(logits.device)

        return choose


def answer(
    pipeline: TextToImagePipeline,
    question: str,
    features: Tensor | None,
    *,
    sampling: TokenSampling = TokenSampling(),
    max_new_tokens: int = 256,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Return the answer of the language model to a question.

    Args:
        pipeline: of a model that reads queries, on a device of torch.
        question: about the image.
        features: (P, C) latent tokens of the image, see ``read_image``; None: there is no image.
        sampling: how tokens are chosen.
        max_new_tokens: largest number of tokens of the answer.
        on_text: called with each new part of the answer.

    Raises:
        UserError: the question is empty, or the model cannot answer questions.
    """
    sampler = pipeline.sampler
    tokenizer = check_answers(pipeline)
    if not question.strip():
        raise UserError("the question is empty: write what to ask about the image")
    if max_new_tokens < 1:
        raise UserError(f"an answer of {max_new_tokens} tokens is impossible: allow 1 or more")
    ids = tokenizer.prompt(question, with_image=features is not None)
    shown = _TextStream(tokenizer, on_text)
    device = sampler.model.latent_queries.device
    with sampler.backend.autocast():
        generate(
            sampler.model,
            [ids],
            StopTokens(tokenizer.turn_end, None),
            features=None if features is None else [features[None].to(device)],
            max_new_tokens=max_new_tokens,
            choose=sampling.chooser(),
            on_tokens=lambda tokens: shown.add(tokens[0]),
        )
    return shown.finish()


def check_answers(pipeline: TextToImagePipeline) -> ConversationTokenizer:
    """Return the tokenizer of a model that can be asked about images.

    Raises:
        UserError: the model reads the tokens of prompts only, or runs on XLA.
    """
    sampler = pipeline.sampler
    if not isinstance(sampler.tokenizer, ConversationTokenizer):
        raise UserError(
            f"{pipeline.name} reads prompts only and cannot be asked about images: choose a model "
            "with read: queries"
        )
    if requires_static_graph(sampler.backend.device):
        raise UserError(
            "answers grow token by token, for which XLA would compile every length: add "
            "runtime.backend=torch"
        )
    return sampler.tokenizer


@torch.no_grad()
def read_image(pipeline: TextToImagePipeline, path: str) -> Tensor:
    """Return the latent tokens (P, C) of an image file, from the encoder.

    The image is resized to the square that the encoder sees, without preserving the aspect ratio.

    Raises:
        UserError: the file is not a readable image.
    """
    try:
        notes = ImageNotes()
        image = decode_rgb(storage.read_bytes(path), path, notes)
        notes.log("--image")
    except (ImageError, OSError) as error:
        raise UserError(f"--image {path} is not a readable image: {error}") from error
    return encode_image(pipeline, image)


@torch.no_grad()
def encode_image(pipeline: TextToImagePipeline, image: Image.Image) -> Tensor:
    """Return the latent tokens (P, C) of an image; see :func:`read_image`."""
    sampler = pipeline.sampler
    rae: RAE = sampler.autoencoder
    size = rae.encoder_input_size
    pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR))
    placed = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).to(sampler.backend.device)
    with sampler.backend.autocast():
        latents = rae.eval().encode(to_unit(placed))
    return (to_tokens(latents) if latents.ndim == 4 else latents)[0].float()


def read_latent(pipeline: TextToImagePipeline, path: str, index: int = 0) -> Tensor:
    """Return the latent tokens (P, C) in a file that ``rae-xla`` wrote.

    Args:
        pipeline: whose model reads them.
        path: a ``.npy`` file of one latent (C, h, w), or of several (N, C, h, w).
        index: of the latent among several.

    Raises:
        UserError: the file has no such latent.
    """
    shape = pipeline.sampler.latent_size
    try:
        content = storage.read_bytes(path) if storage.is_remote(path) else Path(path).read_bytes()
        latents = np.load(io.BytesIO(content), allow_pickle=False)
        if not isinstance(latents, np.ndarray):
            raise ValueError("it is an .npz file")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"--latent {path} cannot be read ({error}): give a .npy file of `rae-xla generate "
            "--save-latents` or `rae-xla sample --keep-latents`"
        ) from error
    found = latents.shape
    latents = latents[None] if latents.ndim == 3 else latents
    if latents.ndim != 4 or latents.shape[1:] != shape:
        raise UserError(
            f"--latent {path} has shape {found}, but the model's latents are {shape}: "
            "choose the model that generated them"
        )
    if not 0 <= index < len(latents):
        raise UserError(f"--latent-index {index}: {path} has latents 0 to {len(latents) - 1}")
    return to_tokens(torch.from_numpy(latents[index : index + 1]).float())[0]


class _TextStream:
    """Turns tokens into text as they come, a complete character at a time."""

    def __init__(
        self, tokenizer: ConversationTokenizer, on_text: Callable[[str], None] | None
    ) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token: int | None) -> None:
        """Add a token; None after the end."""
        if token is None or token == self._tokenizer.turn_end:
            return
        self._ids.append(token)
        for part in self._new_text(complete=False):
            self._show(part)

    def finish(self) -> str:
        """Return the whole text."""
        for part in self._new_text(complete=True):
            self._show(part)
        return self._shown

    def _new_text(self, *, complete: bool) -> Iterator[str]:
        text = self._tokenizer.decode(self._ids)
        # Bytes of a character that is not complete are shown as a replacement character.
        if not complete and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return
        if len(text) > len(self._shown):
            yield text[len(self._shown) :]

    def _show(self, part: str) -> None:
        self._shown += part
        if self._on_text is not None:
            self._on_text(part)
