"""Generation: from the tokens of prompts to text, and to the conditions of images.

The language model first writes text, greedily. Where its next token is ``<im_start>``, the queries
follow, and their final hidden states condition the head. Prompts of different lengths are padded on
the left, and no token attends to padding, so that a prompt does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from rae_xla.errors import UserError
from rae_xla.models.text_to_image.model import TextToImageModel
from rae_xla.models.text_to_image.slots import IMAGE_TOKEN


@dataclass(frozen=True)
class StopTokens:
    """Tokens that end the text.

    Attributes:
        turn_end: the end of the turn.
        image_start: the start of an image; None if the answer is text alone.
    """

    turn_end: int
    image_start: int | None


@dataclass(frozen=True)
class Generated:
    """What the model made of a prompt.

    Attributes:
        ids: of the text after the prompt; the last one is ``<im_start>`` if an image follows.
        condition: (P, condition_dim) of the image; None if the model did not start one.
    """

    ids: list[int]
    condition: Tensor | None


ChooseToken = Callable[[Tensor], Tensor]
"""Chooses tokens (B,) int64 from logits (B, vocabulary)."""


def most_likely(logits: Tensor) -> Tensor:
    """Return the most likely token of each row."""
    return logits.argmax(-1)


@torch.no_grad()
def generate(
    model: TextToImageModel,
    prompts: Sequence[Sequence[int]],
    stop: StopTokens,
    *,
    features: Sequence[Tensor] | None = None,
    max_new_tokens: int = 256,
    use_cache: bool = True,
    choose: ChooseToken = most_likely,
    on_tokens: Callable[[list[int | None]], None] | None = None,
) -> list[Generated]:
    """Continue prompts until they start an image or end.

    Args:
        model: in eval mode.
        prompts: token ids, with one ``IMAGE_TOKEN`` for each context image.
        stop: the tokens that end the text, themselves included in it.
        features: latent tokens (M, P, C) of the context images of each prompt.
        max_new_tokens: largest number of tokens of the text.
        use_cache: keep keys and values of earlier tokens; otherwise compute them for every token.
        choose: chooses the next tokens.
        on_tokens: called with the new token of each prompt, None where the text has ended.

    Raises:
        UserError: a prompt has another number of images than features.
    """
    sequences, hidden = _start(model, prompts, features, use_cache)
    ids: list[list[int]] = [[] for _ in prompts]
    active = [True] * len(ids)
    for _ in range(max_new_tokens):
        chosen = choose((hidden @ model.language_model.output_weight.T).float())
        written = list(active)
        new = chosen.tolist()
        if on_tokens is not None:
            on_tokens([token if row else None for token, row in zip(new, active, strict=True)])
        for i, token in enumerate(new):
            if active[i]:
                ids[i].append(token)
                active[i] = token not in (stop.image_start, stop.turn_end)
        # A row that has ended gets padding.
        embeddings = model.language_model.embedding(chosen)[:, None]
        hidden = sequences.extend(embeddings, torch.tensor(written)[:, None])[:, -1]
        if not any(active):
            break
    images = [bool(row) and row[-1] == stop.image_start for row in ids]
    if not any(images):
        return [Generated(row, None) for row in ids]
    conditions = _read(model, sequences, images)
    return [
        Generated(row, condition if image else None)
        for row, condition, image in zip(ids, conditions, images, strict=True)
    ]


@torch.no_grad()
def image_conditions(model: TextToImageModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the conditions (B, P, condition_dim) of images that follow prompts at once.

    Args:
        model: in eval mode.
        prompts: token ids up to ``<im_start>``, which is their last one.
    """
    sequences, _ = _start(model, prompts, None, use_cache=True)
    return _read(model, sequences, [True] * len(prompts))


class _Sequences:
    """Sequences of embeddings that grow together.

    A column is valid for some rows and padding for the others. The position of a token is the
    number of valid columns of its row before it.
    """

    def __init__(self, model: TextToImageModel, use_cache: bool) -> None:
        self._model = model
        self._cache = DynamicCache() if use_cache else None
        self._embeddings: Tensor | None = None
        self._valid: Tensor | None = None

    def extend(self, embeddings: Tensor, valid: Tensor) -> Tensor:
        """Append columns (B, n, D), valid where ``valid`` (B, n); return their hidden states."""
        count = embeddings.shape[1]
        valid = valid.to(embeddings.device)
        self._valid = valid if self._valid is None else torch.cat([self._valid, valid], 1)
        total = self._valid.shape[1]
        if self._cache is None:
            before = self._embeddings
            embeddings = embeddings if before is None else torch.cat([before, embeddings], 1)
            self._embeddings = embeddings
        new = embeddings.shape[1]
        positions = (self._valid.long().cumsum(1) - 1).clamp(min=0)[:, total - new :]
        column = torch.arange(total, device=valid.device)
        row = column[total - new :, None]
        mask = (self._valid[:, None] & (column <= row)) | (column == row)
        hidden = self._model.language_model.continue_from(
            embeddings, mask[:, None], positions, self._cache
        )
        return hidden[:, new - count :]


def _start(
    model: TextToImageModel,
    prompts: Sequence[Sequence[int]],
    features: Sequence[Tensor] | None,
    use_cache: bool,
) -> tuple[_Sequences, Tensor]:
    """Return sequences that hold the prompts, and the hidden states (B, D) of their last tokens."""
    rows = [
        _embed_prompt(model, ids, None if features is None else features[i])
        for i, ids in enumerate(prompts)
    ]
    length = max(len(row) for row in rows)
    padded = torch.stack(
        [torch.cat([row.new_zeros(length - len(row), row.shape[1]), row]) for row in rows]
    )
    lengths = torch.tensor([len(row) for row in rows])
    valid = torch.arange(length) >= length - lengths[:, None]
    sequences = _Sequences(model, use_cache)
    return sequences, sequences.extend(padded, valid)[:, -1]


def _read(model: TextToImageModel, sequences: _Sequences, images: Sequence[bool]) -> Tensor:
    """Append the queries to the rows with an image; return the conditions of all rows."""
    queries = model.latent_queries.expand(len(images), -1, -1)
    valid = torch.tensor(images)[:, None].expand(-1, queries.shape[1])
    states = sequences.extend(queries, valid)
    conditions: Tensor = model.diff_head_projector(states)
    return conditions


def _embed_prompt(model: TextToImageModel, ids: Sequence[int], images: Tensor | None) -> Tensor:
    """Return the embeddings (L, D) of a prompt, with the projected features of its images."""
    count = 0 if images is None else len(images)
    if list(ids).count(IMAGE_TOKEN) != count:
        raise UserError(
            f"the prompt has {list(ids).count(IMAGE_TOKEN)} <image> placeholders, but {count} "
            "images were given: give one image for each"
        )
    device = model.latent_queries.device
    parts, text, used = [], [], 0
    for token in [*ids, IMAGE_TOKEN]:
        if token != IMAGE_TOKEN:
            text.append(token)
            continue
        if text:
            parts.append(model.language_model.embedding(torch.tensor(text, device=device)))
            text = []
        if images is not None and used < count:
            parts.append(model.mm_projector(images[used].to(device)))
            used += 1
    return torch.cat(parts)
