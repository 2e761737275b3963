"""Prompt reader: the conditions of images, from the tokens of their prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rae_xla.data.conversations import ConversationTokenizer
from rae_xla.data.prompts import PromptTokenizer
from rae_xla.models.text_to_image.generation import image_conditions
from rae_xla.models.text_to_image.model import TextToImageModel
from rae_xla.models.text_to_image.slots import PADDING
from rae_xla.ops.dispatch import requires_static_graph
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.rows import share_rows

# Lengths of compiled graphs are multiples of it, so that similar prompts share one.
_LENGTH_STEP = 64


class PromptReader:
    """Runs the language model on the prompts of a batch, in one pass.

    Args:
        model: placed, in eval mode.
        backend: of the model.
        tokenizer: of the language model.
    """

    def __init__(
        self,
        model: TextToImageModel,
        backend: Backend,
        tokenizer: ConversationTokenizer | PromptTokenizer,
    ) -> None:
        self._model, self._backend, self._tokenizer = model, backend, tokenizer
        self._is_static = requires_static_graph(backend.device)
        self._read_queries = backend.compile(self._queries)
        self._read_prompts = backend.compile(self._prompts)

    def rows(self, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return the tokens of prompts as rows, padded to one length.

        Args:
            tokens: of each row, up to where the image starts.
        """
        length = max(map(len, tokens))
        # Rows that the head attends to have the length of training already, as the null condition.
        if self._is_static and self._model.settings.prompt is None:
            length += -length % _LENGTH_STEP
        ids = torch.full((len(tokens), length), PADDING, dtype=torch.int32)
        for row, of_row in zip(ids, tokens, strict=True):
            row[: len(of_row)] = torch.tensor(of_row, dtype=torch.int32)
        lengths = torch.tensor([len(of_row) for of_row in tokens], dtype=torch.int32)
        return {"ids": ids, "lengths": lengths}

    def read(self, batch: Batch) -> Tensor:
        """Return the conditions (B, ...) of the rows of a batch."""
        ids, lengths = batch["ids"], batch["lengths"]
        if self._model.settings.prompt is not None:
            return self._read_prompts(ids)
        if self._is_static:
            return self._read_queries(ids, lengths)
        counts = lengths.tolist()
        rows = [tuple(row[:n]) for row, n in zip(ids.tolist(), counts, strict=True)]
        unique = list(dict.fromkeys(rows))
        # On a CPU a prompt is read alone, so that its condition does not depend on the others.
        size = 1 if self._backend.on_cpu else len(unique)
        with self._backend.autocast():
            parts = [
                image_conditions(self._model, unique[i : i + size])
                for i in range(0, len(unique), size)
            ]
        place = {row: i for i, row in enumerate(unique)}
        index = torch.tensor([place[row] for row in rows], device=ids.device)
        return torch.cat(parts).float()[index]

    def null_condition(self) -> Tensor:
        """Return the condition of no prompt, which broadcasts to those of a batch.

        Raises:
            UserError: the model was trained without condition dropout.
        """
        null = self._model.null_condition()
        if null is None:
            assert isinstance(self._tokenizer, PromptTokenizer)
            empty, _ = self._tokenizer.row("")
            rows = {"ids": torch.from_numpy(empty)[None]}
            null = self._read_prompts(share_rows(self._backend, rows)["ids"])[0]
        return null.detach()

    @torch.no_grad()
    def _prompts(self, ids: Tensor) -> Tensor:
        with self._backend.autocast():
            return self._model.read_prompts(ids.long()).float()

    @torch.no_grad()
    def _queries(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the conditions of an image that follows each prompt, in a graph without loops.

        The queries come directly after each prompt: padding between them has no positions and is
        not attended to.
        """
        model, count = self._model, ids.shape[1]
        with self._backend.autocast():
            text = model.language_model.embedding(torch.where(ids == PADDING, 0, ids).long())
            queries = model.latent_queries.expand(len(ids), -1, -1)
            embeddings = torch.cat([text, queries.to(text.dtype)], 1)
            column = torch.arange(embeddings.shape[1], device=ids.device)
            valid = (column >= count) | (column < lengths[:, None])
            mask = (valid[:, None] & (column <= column[:, None])) | (column == column[:, None])
            positions = (valid.int().cumsum(1) - 1).clamp(min=0)
            hidden = model.language_model.continue_from(
                embeddings, mask[:, None], positions.long(), None
            )
            return model.conditions(hidden[:, count:]).float()
