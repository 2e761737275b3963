"""Write the prompts that the text-to-image quickstart is evaluated on.

    python scripts/quickstart_t2i/emoji_prompts.py --images results/quickstart_t2i/images \
        --out results/quickstart_t2i/prompts

writes ``all.txt`` and ``few.txt``, a prompt a line for ``rae-xla generate``, and ``all.json`` and
``few.json``, what each of them asks for. The sets in ``all`` are

- trained: every pair of concept and style that was trained on, each on one background;
- held-out: every held-out pair, each on three backgrounds;
- unseen template: every concept in captions that no template of the training produces.

``few`` is every second prompt of the first set, to be drawn several times.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from emoji_captions import (
    COLOURS,
    STYLES,
    UNSEEN_TEMPLATES,
    Concept,
    fill,
    plain_caption,
    read_concepts,
)
from emoji_images import Sprites, read_sprites

TRAINED, HELD_OUT, UNSEEN = "trained", "held-out", "unseen template"
BACKGROUNDS_OF_HELD_OUT = 3


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its image has to show.

    Attributes:
        text: the prompt.
        set: which of the sets it belongs to.
        concept: name of the concept.
        style: a key of ``STYLES``.
        background: a key of ``BACKGROUNDS``.
    """

    text: str
    set: str
    concept: str
    style: str
    background: str


def make_prompts(
    concepts: list[Concept], pairs: list[tuple[int, int]], held_out: list[tuple[int, int]]
) -> list[Prompt]:
    """Return all prompts.

    Args:
        concepts: by number.
        pairs: (concept, style) numbers that were trained on.
        held_out: (concept, style) numbers that were not.
    """
    styles, colours = list(STYLES), list(COLOURS)
    prompts = []

    def plain(kind: str, concept: Concept, style: str, colour: str) -> Prompt:
        text = plain_caption(concept, style, colour)
        return Prompt(text, kind, concept.name, style, colour)

    for i, (concept, style) in enumerate(pairs):
        # Steps of 5 of 6 backgrounds: the styles of a concept get different ones.
        colour = colours[5 * i % len(colours)]
        prompts.append(plain(TRAINED, concepts[concept], styles[style], colour))
    for i, (concept, style) in enumerate(held_out):
        for k in range(BACKGROUNDS_OF_HELD_OUT):
            colour = colours[(i + 2 * k) % len(colours)]
            prompts.append(plain(HELD_OUT, concepts[concept], styles[style], colour))
    of_concept = {c: [s for other, s in pairs if other == c] for c, _ in pairs}
    for number, template in enumerate(UNSEEN_TEMPLATES):
        for c, available in of_concept.items():
            style = styles[available[(c + number) % len(available)]]
            colour = colours[(2 * c + number) % len(colours)]
            concept = concepts[c]
            text = fill(template, concept.name, STYLES[style][0], COLOURS[colour][0])
            prompts.append(Prompt(text, UNSEEN, concept.name, style, colour))
    return prompts


def read_prompts(path: Path) -> list[Prompt]:
    """Read a JSON file of prompts."""
    return [Prompt(**entry) for entry in json.loads(path.read_text())]


def write(images: Path, out: Path) -> dict[str, int]:
    """Write the files of prompts; return the number of prompts in each."""
    sprites = read_sprites(images)
    concepts = read_concepts(len(sprites.concept_names))
    trained, held_out = (_pairs(sprites, hidden) for hidden in (False, True))
    prompts = make_prompts(concepts, trained, held_out)
    few = [prompt for prompt in prompts if prompt.set == TRAINED][::2]
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("all", prompts), ("few", few)):
        (out / f"{name}.txt").write_text("".join(f"{prompt.text}\n" for prompt in chosen))
        entries = [asdict(prompt) for prompt in chosen]
        (out / f"{name}.json").write_text(json.dumps(entries, indent=1) + "\n")
    return {"all": len(prompts), "few": len(few)}


def _pairs(sprites: Sprites, held_out: bool) -> list[tuple[int, int]]:
    """Return the pairs of concept and style, sorted, that are held out, or that are not."""
    chosen = sprites.held_out == held_out
    concepts, styles = sprites.concepts[chosen], sprites.styles[chosen]
    return sorted(zip(concepts.tolist(), styles.tolist(), strict=True))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write the prompts of the evaluation.")
    parser.add_argument("--images", type=Path, required=True, help="folder of emoji_images.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    counts = write(args.images, args.out)
    print(f"{args.out}: {counts['all']} prompts, {counts['few']} to be drawn several times")


if __name__ == "__main__":
    main()
