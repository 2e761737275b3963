"""Conversations with images as token ids and labels, in the format of Scale-RAE.

A turn is ``<|im_start|>ROLE\\nCONTENT<|im_end|>\\n``; a system turn comes first. An image is the
placeholder ``<image>`` in the text, which becomes ``<im_start>``, P positions and ``<im_end>``.
Rows have a static length. Nothing here imports torch: worker processes tokenise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer

from rae_xla.errors import UserError

PLACEHOLDER = "<image>"
IMAGE_TOKEN = -200
"""Id of the positions of images, as published."""
IGNORE = -100
"""Label of tokens that are not predicted."""
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
SYSTEM_MESSAGE = "You are a helpful assistant."
_ROLES = {"human": "user", "gpt": "assistant"}
_PAD_NAMES = ("<|endoftext|>", "<pad>", "[PAD]", "</s>")

Turn = Mapping[str, str]
"""One turn, with ``from`` (human, gpt or another role) and ``value``."""
Ids = npt.NDArray[np.int32]


class DroppedRowError(Exception):
    """A row cannot be used.

    Attributes:
        reason: one of ``DROP_REASONS``, under which the row is counted.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(DROP_REASONS[reason])
        self.reason = reason


DROP_REASONS = {
    "empty": "the conversation has no turns",
    "role": "the first turn has an unknown role",
    "placeholders": "the number of <image> placeholders is not the number of images",
    "images": "there are more images than fit",
    "length": "the row with its images is longer than the sequence",
    "no_answer": "no token of an answer is left",
}
"""Why rows are dropped, by the name of the counter."""


@dataclass(frozen=True)
class TokenRow:
    """One row of a batch.

    Attributes:
        ids: (L,) int32, ``IMAGE_TOKEN`` at the positions of images, padded on the right.
        labels: (L,) int32, ``IGNORE`` where a token is not predicted.
        length: tokens before the padding.
        truncated: tokens that were cut off on the right.
    """

    ids: Ids
    labels: Ids
    length: int
    truncated: int


class ConversationTokenizer:
    """Turns conversations into rows of token ids and labels.

    Args:
        tokenizer: with the special tokens of the format.
        tokens_per_image: P, positions of an image.
        length: L, tokens of a row.
        pad: the token that pads rows; by default the one of the vocabulary that is usual.

    Raises:
        UserError: the tokenizer lacks a special token.
    """

    def __init__(
        self, tokenizer: Tokenizer, tokens_per_image: int, length: int, pad: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.tokens_per_image, self.length = tokens_per_image, length
        needed = (TURN_START, TURN_END, IMAGE_START, IMAGE_END)
        if missing := [token for token in needed if tokenizer.token_to_id(token) is None]:
            raise UserError(
                f"the tokenizer has no {', '.join(missing)}: add them to its tokenizer.json "
                "(`data.conversations.add_delimiters`), or choose the tokenizer of the checkpoint"
            )
        self.turn_start, self.turn_end, self.image_start, self.image_end = (
            _id_of(tokenizer, token) for token in needed
        )
        pads = [pad] if pad is not None else [*_PAD_NAMES, TURN_END]
        ids = [tokenizer.token_to_id(name) for name in pads]
        found = next((i for i in ids if i is not None), None)
        if found is None:
            raise UserError(f"the tokenizer has no padding token {pad!r}: name one that it has")
        self.pad = int(found)
        newline = self.encode("\n")
        # Supervised wherever they occur, as published.
        self._structure = np.array([*newline[-1:], self.turn_start, self.turn_end])

    @property
    def max_images(self) -> int:
        """Largest number of images of a row."""
        return max(self.length // self.tokens_per_image - 1, 0)

    def row(self, conversation: Sequence[Turn], images: int) -> TokenRow:
        """Return the row of a conversation.

        Args:
            conversation: its turns.
            images: number of images that belong to it.

        Raises:
            DroppedRowError: the row cannot be used.
        """
        turns = self._turns(conversation, images)
        parts = [self._system()]
        for role, content in turns:
            turn_ids, turn_labels = self._turn(role, content, images > 0)
            parts.append((turn_ids, turn_labels, np.full(len(turn_ids), role != "user")))
        ids = np.concatenate([part[0] for part in parts])
        labels = np.concatenate([part[1] for part in parts])
        answered = np.concatenate([part[2] for part in parts])
        if np.count_nonzero(ids == IMAGE_TOKEN) != images:
            raise DroppedRowError("placeholders")
        repeats = np.where(ids == IMAGE_TOKEN, self.tokens_per_image, 1)
        ids, labels = np.repeat(ids, repeats), np.repeat(labels, repeats)
        answered = np.repeat(answered, repeats)
        truncated = max(len(ids) - self.length, 0)
        if truncated and images:
            raise DroppedRowError("length")
        kept = slice(self.length)
        if not np.any(answered[kept] & (labels[kept] != IGNORE)):
            raise DroppedRowError("no_answer")
        length = min(len(ids), self.length)
        return TokenRow(
            self._padded(ids[kept], self.pad), self._padded(labels[kept], IGNORE), length, truncated
        )

    def prompt(self, question: str, with_image: bool = False) -> list[int]:
        """Return the ids of a question up to where the answer starts, with one id per image.

        The ids are those that a training row with this question begins with.
        """
        if with_image:
            question = f"{PLACEHOLDER}\n{question}"
        ids, _, _ = self._system()
        asked, _ = self._turn("user", question, with_image)
        return [*ids.tolist(), *asked.tolist(), *self.encode(f"{TURN_START}assistant\n")]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, with special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def _turns(self, conversation: Sequence[Turn], images: int) -> list[tuple[str, str]]:
        if not conversation:
            raise DroppedRowError("empty")
        if images > self.max_images:
            raise DroppedRowError("images")
        turns = [(turn["from"], turn["value"]) for turn in conversation]
        if images and not any(PLACEHOLDER in value for _, value in turns):
            turns[0] = (turns[0][0], f"{PLACEHOLDER}\n{turns[0][1]}")
        if turns[0][0] not in _ROLES:
            raise DroppedRowError("role")
        if turns[0][0] != "human":
            turns = turns[1:]
        return [(_ROLES.get(role, role), value) for role, value in turns]

    def _system(self) -> tuple[Ids, Ids, npt.NDArray[np.bool_]]:
        ids, labels = self._turn("system", SYSTEM_MESSAGE, has_image=False)
        return ids, labels, np.zeros(len(ids), bool)

    def _turn(self, role: str, content: str, has_image: bool) -> tuple[Ids, Ids]:
        text = f"{TURN_START}{role}\n{content}{TURN_END}\n"
        ids: list[int] = []
        # Without images a placeholder is ordinary text.
        for i, piece in enumerate(text.split(PLACEHOLDER) if has_image else [text]):
            if i:
                ids += [self.image_start, IMAGE_TOKEN, self.image_end]
            ids += self.encode(piece) if piece else []
        array = np.array(ids, np.int32)
        keep = np.isin(array, self._structure) if role in ("system", "user") else True
        return array, np.where(keep & (array != IMAGE_TOKEN), array, np.int32(IGNORE))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, in which special tokens may occur."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _padded(self, values: Ids, fill: int) -> Ids:
        row = np.full(self.length, fill, np.int32)
        row[: len(values)] = values
        return row


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """Read ``tokenizer.json`` of a model folder.

    Raises:
        UserError: the file is missing or not valid.
    """
    file = Path(folder).expanduser() / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{file} does not exist: give a folder with the tokenizer of the language model, as "
            "transformers' save_pretrained writes it"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises a plain Exception
        raise UserError(f"{file} is not a tokenizer ({error}): copy it again") from error


def add_delimiters(tokenizer: Tokenizer) -> list[int]:
    """Add the image delimiters to a tokenizer that lacks them; returns their ids."""
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (IMAGE_START, IMAGE_END)]
    )
    return [_id_of(tokenizer, token) for token in (IMAGE_START, IMAGE_END)]


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, "the caller has checked that the token exists"
    return int(found)


def generation_turns(caption: str, prompt: str = "{caption}", answer: str = "") -> list[Turn]:
    """Return the conversation in which a caption asks for an image.

    Args:
        caption: of the image.
        prompt: the request, with ``{caption}`` in the place of the caption.
        answer: text before the image.
    """
    text = f"{answer}\n{PLACEHOLDER}" if answer else PLACEHOLDER
    request = prompt.replace("{caption}", caption).replace(PLACEHOLDER, "")
    return [{"from": "human", "value": request}, {"from": "gpt", "value": text}]


def parse_conversation(value: Any) -> list[Turn]:
    """Return the turns in a JSON value; ``role`` and ``content`` are accepted as key names too.

    Raises:
        ValueError: the value is not a list of turns.
    """
    names = {"user": "human", "assistant": "gpt"}
    turns: list[Turn] = []
    for turn in value if isinstance(value, list) else [value]:
        if not isinstance(turn, dict):
            raise ValueError("a turn is not a JSON object")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError("a turn has no text in 'from' and 'value'")
        turns.append({"from": names.get(role, role), "value": text})
    return turns
