"""Captions of the emoji: many ways of saying which thing, in which style, on which background.

A caption names three attributes. The language model that reads it is frozen, so the text-to-image
model has to learn which words carry the attributes, wherever they stand: hence many templates of
different structure, and synonyms. ``UNSEEN_TEMPLATES`` are never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CONCEPTS_FILE = Path(__file__).with_name("concepts.json")

STYLES = {
    "noto": ("shaded", "Noto", "softly shaded"),
    "flat": ("flat", "Fluent", "flat modern"),
    "twemoji": ("cartoon", "Twemoji", "simple cartoon"),
    "3d": ("3D", "three-dimensional", "glossy 3D"),
}
"""Names of each style; the first is used where one has to be chosen."""
COLOURS = {
    "white": ("white", "plain white"),
    "black": ("black", "dark"),
    "blue": ("blue", "sky blue"),
    "green": ("green", "grass green"),
    "yellow": ("yellow", "bright yellow"),
    "pink": ("pink", "rosy pink"),
}
"""Names of each background."""

PLAIN_TEMPLATE = "a {style} {concept} on a {colour} background"
TEMPLATES = (
    PLAIN_TEMPLATE,
    "{concept}, {style} style, {colour} background",
    "{style} {concept}, {colour}",
    "an image of a {concept} in {style} style, on {colour}",
    "{colour} background with a {style} {concept}",
    "a {style} emoji of a {concept}, the background is {colour}",
    "on a {colour} background, a {concept} in the {style} style",
    "draw a {concept} with a {style} look and a {colour} background",
    "an icon: {concept}, drawn {style}, on {colour}",
    "{style} style. {colour} background. a {concept}.",
    "the {concept} is {style} and stands in front of {colour}",
    "please paint one {style} {concept} over something {colour}",
    "a {concept} on {colour}, {style} emoji",
    "{colour}: a {concept} ({style})",
    "show me the {concept} emoji as {style} art with {colour} behind it",
    "a small {colour} card that shows a {style} {concept}",
    "this {style} drawing has a {concept} at the centre, all around it is {colour}",
    "I want a {concept}. Make it {style}, make the background {colour}.",
    "in {style} style: one {concept}, {colour} backdrop",
    "against {colour} you see a {concept}, which is {style}",
    "a sticker of the {style} {concept} with a {colour} backdrop",
    "what a {style} {concept} looks like on {colour} paper",
    "here is a {colour} square and inside it a {concept} in {style} design",
    "my favourite {concept} as a {style} icon, {colour} behind",
)
UNSEEN_TEMPLATES = (
    "can you make an image where a {concept} appears in {style} design, with {colour} behind it",
    "there should be a {concept} in the middle of a {colour} area, rendered {style}",
    "a {style} illustration: the {concept} before a {colour} wall",
)
"""Templates for evaluation only."""


@dataclass(frozen=True)
class Concept:
    """A thing.

    Attributes:
        name: in captions.
        icon: its name in the icon sets.
        code: its code points, the file name of the 3D style.
        synonyms: other names.
    """

    name: str
    icon: str
    code: str
    synonyms: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return (self.name, *self.synonyms)


def read_concepts(count: int | None = None) -> list[Concept]:
    """Return the first ``count`` concepts, or all (None)."""
    entries = json.loads(CONCEPTS_FILE.read_text())[:count]
    return [
        Concept(entry["name"], entry["icon"], entry["code"], tuple(entry.get("synonyms", ())))
        for entry in entries
    ]


def fill(template: str, concept: str, style: str, colour: str) -> str:
    """Return a caption; the article fits the word that follows it."""
    text = template.format(concept=concept, style=style, colour=colour)
    words = text.split(" ")
    for i, word in enumerate(words[:-1]):
        if word == "a" and words[i + 1][0] in "aeiou":
            words[i] = "an"
        elif word == "an" and words[i + 1][0] not in "aeiou":
            words[i] = "a"
    return " ".join(words)


def plain_caption(concept: Concept, style: str, colour: str) -> str:
    """Return the caption that the evaluation uses for what was trained on."""
    return fill(PLAIN_TEMPLATE, concept.name, STYLES[style][0], COLOURS[colour][0])


def training_captions(
    concept: Concept, style: str, colour: str, count: int, rng: np.random.Generator
) -> list[str]:
    """Return ``count`` captions of an image; the first is the plain one.

    The templates are all different as long as there are enough. Half of the words are the first
    names of their attribute, so that each caption of the evaluation consists of known words.
    """

    def pick(names: Sequence[str]) -> str:
        others = len(names) - 1
        return names[0] if not others or rng.random() < 0.5 else names[1 + rng.integers(others)]

    order = [0, *(1 + rng.permutation(len(TEMPLATES) - 1))]
    captions = [plain_caption(concept, style, colour)]
    for i in range(1, count):
        template = TEMPLATES[order[i % len(order)]]
        words = (pick(concept.names), pick(STYLES[style]), pick(COLOURS[colour]))
        captions.append(fill(template, *words))
    return captions
