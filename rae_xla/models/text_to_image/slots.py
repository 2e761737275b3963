"""Where the images of a sequence are: functions of token ids and labels, without host decisions.

A sequence has up to M images of P positions each. Slot m of a row is the row's m-th image. It is
an *answer*, an image to generate, if the token before it is supervised; otherwise it is context.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rae_xla.ops.cross_entropy import IGNORE
from rae_xla.ops.gather import gather_tokens

IMAGE_TOKEN = -200
"""Token id of the positions of images, as published."""
PADDING = -1
"""Token id of the positions after the end of a prompt, in rows that are prompts alone."""


class ImageSlots(NamedTuple):
    """The images of a batch of sequences.

    Attributes:
        is_image: (B, L) bool, the positions of images.
        order: (B, L) int64, for a position of an image its number among those of the row, from 0.
        starts: (B, M) int64, the first position of each slot; L for a slot without image.
        present: (B, M) bool, the slots with an image.
        answer: (B, M) bool, the slots whose image is to be generated.
    """

    is_image: Tensor
    order: Tensor
    starts: Tensor
    present: Tensor
    answer: Tensor


def find_slots(ids: Tensor, labels: Tensor, slots: int, tokens: int) -> ImageSlots:
    """Find the images of sequences.

    Args:
        ids: (B, L), ``IMAGE_TOKEN`` at the positions of images.
        labels: (B, L), ``IGNORE`` where a token is not supervised.
        slots: M, the largest number of images of a row.
        tokens: P, positions of an image.
    """
    is_image = ids == IMAGE_TOKEN
    count = is_image.int().cumsum(1)
    order = (count - 1).clamp(0, slots * tokens - 1).long()
    before = torch.arange(slots, device=ids.device) * tokens
    starts = (count[:, None] <= before[:, None]).sum(-1)
    present = count[:, -1:] > before
    previous = (starts - 1).clamp(0, ids.shape[1] - 1)
    supervised = labels.gather(1, previous) != IGNORE
    return ImageSlots(is_image, order, starts, present, present & supervised & (starts > 0))


def prompt_slots(ids: Tensor, slots: int) -> ImageSlots:
    """Return the images of rows that are prompts alone: the first slot of each is an answer.

    Args:
        ids: (B, L), of which the shape counts.
        slots: M.
    """
    zero = torch.zeros_like(ids)
    first = torch.arange(slots, device=ids.device) < 1
    answer = first.expand(ids.shape[0], -1)
    starts = (zero[:, :1] + ids.shape[1]).expand(-1, slots)
    return ImageSlots(zero.bool(), zero, starts, answer, answer)


def answers_first(answer: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the slots (B, count) of the first answers of each row, and which of them exist.

    Args:
        answer: (B, M) bool.
        count: number of answers to find; a slot that does not exist is M - 1.
    """
    cumulative = answer.int().cumsum(1)
    index = torch.arange(count, device=answer.device)
    slot = (cumulative[:, None] <= index[:, None]).sum(-1).clamp(max=answer.shape[1] - 1)
    return slot, cumulative[:, -1:] > index


def select_slots(values: Tensor, slot: Tensor) -> Tensor:
    """Return the values (B, A, ...) of slots (B, A), from those of all slots (B, M, ...)."""
    return gather_tokens(values, slot)


def positions_of(slots: ImageSlots, tokens: int) -> Tensor:
    """Return the positions (B, M, P) of the tokens of every slot; arbitrary ones without image."""
    last = slots.is_image.shape[1] - 1
    offsets = torch.arange(tokens, device=slots.starts.device)
    return (slots.starts[..., None] + offsets).clamp(max=last)


def select_rows(values: Tensor, pattern: tuple[int, int]) -> Tensor:
    """Return the first ``count`` of every ``period`` consecutive rows; ``pattern`` has both."""
    period, count = pattern
    if count == period:
        return values
    return values.reshape(-1, period, *values.shape[1:])[:, :count].flatten(0, 1)
