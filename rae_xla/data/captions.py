"""Captions of training: which text of a sample is used, and the row of tokens made of it.

Every choice is a function of (seed, epoch, sample), so that a run resumes with the very same
rows on any number of hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae_xla.data.bad_samples import SampleError
from rae_xla.data.conversations import (
    PLACEHOLDER,
    ConversationTokenizer,
    DroppedRowError,
    TokenRow,
    Turn,
    add_delimiters,
    generation_turns,
    parse_conversation,
    read_tokenizer,
)
from rae_xla.data.counter_rng import Purpose, uniform
from rae_xla.data.shards.texts import Texts, TextTable, value_at
from rae_xla.errors import UserError

REMEDY = "correct the captions, or raise data.max_bad_samples to train without such samples"


@dataclass(frozen=True)
class CaptionChoice:
    """Which text of a sample is its caption.

    Attributes:
        sources: dotted paths, such as ``txt``, ``json.caption``, ``txt.0`` (the first line) or
            ``json.conversations``, in the order of preference.
        weights: how often each is chosen, among those that a sample has; empty: the first one that
            it has.
        max_chars: longer captions are cut; 0: no limit.
    """

    sources: tuple[str, ...] = ("txt", "json.caption", "json.prompt", "json.conversations")
    weights: tuple[float, ...] = ()
    max_chars: int = 0

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.sources):
            raise UserError(
                f"text_to_image.captions.weights has {len(self.weights)} numbers for "
                f"{len(self.sources)} sources: give one for each"
            )

    def choose(self, texts: Texts, u: float) -> str | list[Turn] | None:
        """Return the caption or conversation of a sample; None if it has none.

        Args:
            texts: of the sample.
            u: uniform in [0, 1), which selects among several.
        """
        found = [(i, value_at(texts, source)) for i, source in enumerate(self.sources)]
        usable = [(i, value) for i, value in found if isinstance(value, (str, list)) and value]
        if not usable:
            return None
        weights = [self.weights[i] for i, _ in usable] if self.weights else [1.0]
        bounds = np.cumsum(weights) / sum(weights) if sum(weights) > 0 else np.ones(1)
        value = usable[min(int(np.searchsorted(bounds, u, side="right")), len(usable) - 1)][1]
        if isinstance(value, list):
            return parse_conversation(value)
        return value[: self.max_chars] if self.max_chars else value


@dataclass(frozen=True)
class RowFormat:
    """How captions become conversations.

    Attributes:
        prompts: requests for an image, with ``{caption}``; one is chosen for each sample.
        answer: text of the answer before the image.
        question: of the rows in which the caption is the answer about the image.
        row_pattern: (period, count): the first ``count`` of every ``period`` rows generate their
            image, the others describe it.
        micro_batches: of a step; rows are dealt to them in turn, and the pattern holds in each.
    """

    prompts: tuple[str, ...] = ("{caption}",)
    answer: str = ""
    question: str = "Describe the image."
    row_pattern: tuple[int, int] = (1, 1)
    micro_batches: int = 1

    def generates(self, row: int) -> bool:
        """Return whether row number ``row`` of the global batch generates its image."""
        period, count = self.row_pattern
        return (row // self.micro_batches) % period < count

    def turns(self, caption: str, row: int, u: float) -> list[Turn]:
        """Return the conversation of a caption in a row; ``u`` in [0, 1) selects the prompt."""
        if self.generates(row):
            prompt = self.prompts[int(u * len(self.prompts))]
            return generation_turns(caption, prompt, self.answer)
        text = caption.replace(PLACEHOLDER, "")
        return [
            {"from": "human", "value": f"{PLACEHOLDER}\n{self.question}"},
            {"from": "gpt", "value": text},
        ]


@dataclass
class CaptionRows:
    """Token rows for the samples of a mixture; it pickles, and workers open it themselves.

    Attributes:
        tables: texts of each source, by the number of its first sample in the mixture.
        tokenizer: folder of ``tokenizer.json``.
        tokens_per_image: positions of an image.
        length: tokens of a row.
        seed: of the run.
        choice: of captions.
        format: of rows.
        images_per_row: image slots of a row.
        answers_per_row: images that a row may generate.
    """

    tables: dict[int, TextTable]
    tokenizer: str
    tokens_per_image: int
    length: int
    seed: int
    choice: CaptionChoice = field(default_factory=CaptionChoice)
    format: RowFormat = field(default_factory=RowFormat)
    images_per_row: int = 1
    answers_per_row: int = 1

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("rows", None)
        return state

    @cached_property
    def rows(self) -> ConversationTokenizer:
        """The tokenizer, opened at first use in each process."""
        return open_tokenizer(self.tokenizer, self.tokens_per_image, self.length)

    def arrays(self, first_id: int, sample: int, epoch: int, row: int) -> dict[str, NDArray[Any]]:
        """Return the arrays of one row.

        Args:
            first_id: of the source, see ``source_rows.SourceRows``.
            sample: number in its source.
            epoch: of the step.
            row: number in the global batch.

        Raises:
            SampleError: the sample has no usable caption.
        """
        token_row = self._row(first_id, sample, epoch, row)
        return {
            "ids": token_row.ids,
            "labels": token_row.labels,
            "truncated": np.array(token_row.truncated > 0, np.float32),
        }

    def arrange(self, shares: Sequence[int]) -> list[NDArray[np.int64]]:
        """Return the rows of every source in a global batch, from their numbers.

        Sources without images to generate get rows for which the head does not run, as far as
        there are enough of these.
        """
        total = sum(shares)
        generating = np.array([self.format.generates(row) for row in range(total)], bool)
        others: list[int] = np.flatnonzero(~generating).tolist()
        taken: list[list[int]] = []
        for table, share in zip(self.tables.values(), shares, strict=True):
            count = 0 if table.has_answers else min(share, len(others))
            taken.append(others[:count])
            del others[:count]
        used = {row for rows in taken for row in rows}
        free = iter([row for row in range(total) if row not in used])
        for rows, share in zip(taken, shares, strict=True):
            rows += [next(free) for _ in range(share - len(rows))]
        return [np.array(sorted(rows), np.int64) for rows in taken]

    def first_captions(self, count: int) -> list[str]:
        """Return the first different captions of the first source, for previews."""
        table = self.tables[0]
        found: dict[str, None] = {}
        for sample in range(min(len(table), 16 * count)):
            if table.image_count(sample) != 1:
                continue
            caption = self.choice.choose(table[sample], 0.0)
            if isinstance(caption, str) and caption.strip():
                found[caption] = None
            if len(found) == count:
                break
        return list(found)

    def _row(self, first_id: int, sample: int, epoch: int, row: int) -> TokenRow:
        number = np.array([first_id + sample])
        u = [
            float(uniform(self.seed, purpose, epoch, number)[0])
            for purpose in (Purpose.CAPTION, Purpose.PROMPT)
        ]
        table = self.tables[first_id]
        where = f"{table.folder}: sample {sample}"
        try:
            caption = self.choice.choose(table[sample], u[0])
        except ValueError as error:
            raise SampleError(f"{where}: the conversation is not valid ({error})", REMEDY) from None
        if caption is None:
            sources = ", ".join(self.choice.sources)
            raise SampleError(f"{where} has no caption ({sources})", REMEDY)
        images = table.image_count(sample)
        is_text = isinstance(caption, str)
        if isinstance(caption, str):
            if images != 1:
                raise SampleError(f"{where} has a caption, but {images} images", REMEDY)
            turns = self.format.turns(caption, row, u[1])
        else:
            turns = caption
            self._check_images(where, turns, images, row)
        try:
            return self.rows.row(turns, images)
        except DroppedRowError as error:
            kind = "caption" if is_text else "conversation"
            raise SampleError(f"{where}: the {kind} cannot be used: {error}", REMEDY) from None

    def _check_images(self, where: str, turns: list[Turn], images: int, row: int) -> None:
        if images > self.images_per_row:
            raise SampleError(
                f"{where} has {images} images, more than text_to_image.images_per_row = "
                f"{self.images_per_row}",
                "raise that, or data.max_bad_samples to train without such samples",
            )
        answers = sum(turn["value"].count(PLACEHOLDER) for turn in turns if turn["from"] == "gpt")
        if answers > self.answers_per_row and self.format.generates(row):
            raise SampleError(
                f"{where} generates {answers} images, more than text_to_image.answers_per_row = "
                f"{self.answers_per_row}",
                "raise that, or data.max_bad_samples to train without such samples",
            )


def open_tokenizer(folder: str, tokens_per_image: int, length: int) -> ConversationTokenizer:
    """Open the tokenizer of a language model; image delimiters that it lacks are added.

    Added tokens get the numbers after the last token, which padded embedding tables have rows for.

    Raises:
        UserError: the tokenizer is missing, or lacks the tokens of the chat format.
    """
    tokenizer = read_tokenizer(Path(folder))
    add_delimiters(tokenizer)
    return ConversationTokenizer(tokenizer, tokens_per_image, length)


def check_length(length: int, tokens_per_image: int, images: int = 1) -> None:
    """Raise unless a row of ``length`` tokens has space for ``images`` images and some text.

    Raises:
        UserError: it has not.
    """
    if length < (images + 1) * tokens_per_image:
        alone = "an image alone takes" if images == 1 else f"{images} images alone take"
        raise UserError(
            f"text_to_image.length is {length}, but {alone} {images * tokens_per_image} tokens: "
            f"write at least {(images + 1) * tokens_per_image}"
        )
