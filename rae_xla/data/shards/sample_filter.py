"""Which samples of images with texts can be used, and why the others cannot."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rae_xla.data.conversations import PLACEHOLDER, Turn, parse_conversation
from rae_xla.data.image_decoding import ImageError, open_image
from rae_xla.data.shards.texts import Texts, strings, value_at

CONVERSATIONS = ("json.conversations", "json.messages", "sidecar.conversations")
"""Where the conversation of a sample is, if it has one."""

NO_IMAGE, TWO_IMAGES = "there is no image", "there are two images"


class ImageFacts(NamedTuple):
    """Where an image is, and what a filter needs to know about it.

    Attributes:
        offset: of its first byte in the file that contains it.
        size: in bytes.
        crc32: of its bytes.
        sides: the shorter and the longer one in pixels; None if its header is not readable.
    """

    offset: int
    size: int
    crc32: int
    sides: tuple[int, int] | None


def image_facts(content: bytes, offset: int = 0, *, with_sides: bool = True) -> ImageFacts:
    """Return the facts of an encoded image; its header is read only ``with_sides``."""
    sides = None
    if with_sides:
        try:
            with open_image(content) as opened:
                short, long = sorted(opened.size)
                sides = (short, long)
        except ImageError:
            pass
    return ImageFacts(offset, len(content), zlib.crc32(content), sides)


@dataclass(frozen=True)
class SampleFilter:
    """Which samples an index takes.

    Attributes:
        min_side: smallest shorter side of an image in pixels.
        max_aspect: largest ratio of the longer to the shorter side.
        min_chars: fewest characters of the longest text.
        max_chars: most characters of the longest text; None: no limit.
        score: where a number is, such as ``json.aesthetic``; samples without it are not taken.
        min_score: smallest value of it.
    """

    min_side: int = 0
    max_aspect: float | None = None
    min_chars: int = 1
    max_chars: int | None = None
    score: str | None = None
    min_score: float = 0.0

    @property
    def needs_sides(self) -> bool:
        """Whether the headers of images have to be read."""
        return bool(self.min_side) or self.max_aspect is not None

    def reason(self, images: Sequence[ImageFacts], texts: Texts) -> str | None:
        """Return why a sample is not taken; None if it is."""
        for image in images if self.needs_sides else ():
            if image.sides is None:
                return "the image does not decode"
            short, long = image.sides
            if short < self.min_side:
                return f"the image is smaller than {self.min_side} pixels"
            if self.max_aspect is not None and long > self.max_aspect * short:
                return f"the image is longer than {self.max_aspect:g} times its width"
        longest = max((len(text) for text in strings(texts)), default=0)
        if longest < self.min_chars:
            return "the caption is missing or too short"
        if self.max_chars is not None and longest > self.max_chars:
            return f"the caption is longer than {self.max_chars} characters"
        if self.score is not None:
            score = value_at(texts, self.score)
            if not isinstance(score, (int, float)) or score < self.min_score:
                return f"{self.score} is missing or below {self.min_score:g}"
        return None


def conversation_in(texts: Texts) -> list[Turn] | None:
    """Return the conversation of a sample; None if it has none.

    Raises:
        ValueError: it is not a list of turns.
    """
    for path in CONVERSATIONS:
        if (value := value_at(texts, path)) is not None:
            return parse_conversation(value)
    return None


def number_fault(images: int, texts: Texts) -> str | None:
    """Return what is wrong with the number of images of a sample; None if nothing is.

    A caption belongs to one image. A conversation has one ``<image>`` for each image, or none if
    there is only one image.
    """
    try:
        turns = conversation_in(texts)
    except ValueError:
        return "the conversation is not valid"
    if turns is None:
        return None if images == 1 else NO_IMAGE if images == 0 else TWO_IMAGES
    placeholders = sum(turn["value"].count(PLACEHOLDER) for turn in turns)
    if placeholders == images or (placeholders == 0 and images == 1):
        return None
    return "a conversation has not as many <image> as images"


def has_answer(images: int, texts: Texts) -> bool:
    """Return whether a usable sample has an image to generate."""
    turns = conversation_in(texts) if images else []
    if turns is None:  # a caption
        return True
    return any(turn["from"] == "gpt" and PLACEHOLDER in turn["value"] for turn in turns)


@dataclass
class FoundSamples:
    """Samples of images with texts in the order of their source, and the dropped ones by reason.

    Attributes:
        texts: one line of JSON for each sample.
        counts: number of images of each sample.
        images: of all samples, one after another.
        answers: number of samples with an image to generate.
        dropped: number of samples that cannot be used, by reason.
        first_dropped: name of the first one, by reason.
    """

    texts: list[bytes] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    images: list[ImageFacts] = field(default_factory=list)
    answers: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, name: str) -> None:
        """Count a sample that cannot be used."""
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, name)

    def add(self, line: bytes, images: Sequence[ImageFacts], texts: Texts) -> None:
        """Add a usable sample."""
        self.texts.append(line)
        self.counts.append(len(images))
        self.images += images
        self.answers += has_answer(len(images), texts)

    def merge(self, other: FoundSamples) -> None:
        """Append the samples of another part of the source."""
        self.texts += other.texts
        self.counts += other.counts
        self.images += other.images
        self.answers += other.answers
        self.dropped += other.dropped
        self.first_dropped = other.first_dropped | self.first_dropped


def describe_dropped(dropped: Mapping[str, int], first: Mapping[str, str] | None = None) -> str:
    """Return ``3 samples: the caption is missing (a.tar: 07, …); 1 sample: …``, or ``none``.

    Args:
        dropped: number of samples by reason.
        first: name of the first one by reason, if known.
    """
    parts = []
    for reason, count in sorted(dropped.items()):
        name = (first or {}).get(reason)
        shown = "" if name is None else f" ({name}{', …' * (count > 1)})"
        parts.append(f"{count} sample{'s' * (count > 1)}: {reason}{shown}")
    return "; ".join(parts) or "none"


def named_images(texts: Texts) -> list[str] | None:
    """Return the names of images that the JSON of a sample lists; None if it lists none.

    ``image_filename`` is Scale-RAE's key; ``image`` and ``images`` are those of LLaVA.
    """
    for key in ("image_filename", "image", "images"):
        value: Any = value_at(texts, f"json.{key}")
        if isinstance(value, str) and value:
            return [value]
        if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
            return list(value)
    return None
