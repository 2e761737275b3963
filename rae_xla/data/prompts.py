"""Rows of models that read the tokens of the prompt: a caption in a template, and nothing else.

Nothing here imports torch: worker processes tokenise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from rae_xla.data.bad_samples import SampleError
from rae_xla.data.captions import REMEDY, CaptionRows
from rae_xla.data.conversations import IGNORE, PLACEHOLDER, Turn, read_tokenizer
from rae_xla.data.counter_rng import Purpose, uniform

PADDING = -1
"""Id of the positions after the end of a prompt."""


class PromptTokenizer:
    """Turns prompts into rows of token ids.

    The special tokens that the tokenizer itself adds, such as the ``[CLS]`` of BERT, are kept, also
    where a prompt is cut.

    Args:
        tokenizer: of the language model; its truncation and padding are replaced.
        length: L, tokens of a row.
        template: around a prompt, with ``{caption}``; special tokens may occur in it.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, template: str = "{caption}") -> None:
        self.tokenizer, self.length, self.template = tokenizer, length, template
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)

    def row(self, prompt: str, template: str | None = None) -> tuple[npt.NDArray[np.int32], bool]:
        """Return the ids (L,) of a prompt, padded on the right, and whether it was cut.

        Args:
            prompt: a caption; empty for the null condition.
            template: replaces that of the constructor.
        """
        text = (self.template if template is None else template).replace("{caption}", prompt)
        encoding = self.tokenizer.encode(text)
        row = np.full(self.length, PADDING, np.int32)
        row[: len(encoding.ids)] = encoding.ids
        return row, bool(encoding.overflowing)


@dataclass
class PromptRows(CaptionRows):
    """Rows of prompts for the samples of a mixture; ``CaptionRows`` for ``PromptTokenizer``.

    ``format.prompts`` are the templates. A conversation gives the first message of its user.

    Attributes:
        dropout: probability of the empty prompt, for guidance.
    """

    dropout: float = 0.0

    @cached_property
    def rows(self) -> PromptTokenizer:  # type: ignore[override]
        """The tokenizer, opened at first use in each process."""
        tokenizer = read_tokenizer(Path(self.tokenizer))
        return PromptTokenizer(tokenizer, self.length, self.format.prompts[0])

    def arrays(
        self, first_id: int, sample: int, epoch: int, row: int
    ) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of one row, in which no token is supervised.

        Raises:
            SampleError: the sample has no usable caption.
        """
        number = np.array([first_id + sample])
        purposes = (Purpose.CAPTION, Purpose.PROMPT, Purpose.PROMPT_DROPOUT)
        u = [float(uniform(self.seed, purpose, epoch, number)[0]) for purpose in purposes]
        table = self.tables[first_id]
        where = f"{table.folder}: sample {sample}"
        try:
            caption = self.choice.choose(table[sample], u[0])
        except ValueError as error:
            raise SampleError(f"{where}: the conversation is not valid ({error})", REMEDY) from None
        if (images := table.image_count(sample)) != 1:
            raise SampleError(f"{where} has {images} images, and a prompt asks for one", REMEDY)
        if isinstance(caption, list):
            caption = _request(caption)
        if not caption:
            sources = ", ".join(self.choice.sources)
            raise SampleError(f"{where} has no caption ({sources})", REMEDY)
        templates = self.format.prompts
        prompt = "" if u[2] < self.dropout else caption
        ids, cut = self.rows.row(prompt, templates[int(u[1] * len(templates))])
        return {
            "ids": ids,
            "labels": np.full_like(ids, IGNORE),
            "truncated": np.array(cut, np.float32),
        }


def _request(turns: list[Turn]) -> str:
    """Return the first message of the user of a conversation; empty if there is none."""
    messages = (turn["value"] for turn in turns if turn["from"] == "human")
    return next(messages, "").replace(PLACEHOLDER, "").strip()
