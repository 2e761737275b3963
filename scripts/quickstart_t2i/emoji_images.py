"""Render captioned emoji: the images of the text-to-image quickstart.

Every concept is drawn in four styles on six backgrounds. A tenth of the pairs of concept and style
is held out: nothing but the judge is trained on them, so they show what the model composes.

    python scripts/quickstart_t2i/emoji_images.py --packages results/quickstart_t2i/packages \
        --out results/quickstart_t2i/images

writes ``png/{train,heldout}/<concept>/<style>-<background>.png``, ``sprites.npz`` (the emoji
without background) and ``tars/train.tar`` with the training images and their captions.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from emoji_captions import COLOURS, STYLES, Concept, read_concepts, training_captions
from packages import FLUENT_3D, FLUENT_FLAT, NOTO, TWEMOJI, Package
from PIL import Image

IMAGE_SIZE = 64
MARGIN = 3
"""Pixels between an emoji and the edge of its image."""
SCALE = 4
"""Emoji are rendered this many times larger, then averaged."""
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (35, 35, 40),
    "blue": (90, 150, 230),
    "green": (120, 195, 120),
    "yellow": (250, 215, 90),
    "pink": (245, 160, 190),
}
ICON_SETS: Mapping[str, Package] = {"noto": NOTO, "flat": FLUENT_FLAT, "twemoji": TWEMOJI}
HELD_OUT_SHARE = 0.1
SPLIT_SEED = 0
CAPTIONS_PER_IMAGE = 16


@dataclass(frozen=True)
class Sprite:
    """An emoji without background.

    Attributes:
        concept: what it shows.
        style: a key of ``STYLES``.
        pixels: (H, W, 4) float32 in [0, 1], colours multiplied by the opacity.
        held_out: whether no model may be trained on it.
    """

    concept: Concept
    style: str
    pixels: np.ndarray
    held_out: bool


def slug(name: str) -> str:
    """Return a name as a folder name."""
    return name.replace(" ", "-")


def image_file(concept: str, style: str, background: str, held_out: bool) -> Path:
    """Return the path of a real image below the folder of all images."""
    split = "heldout" if held_out else "train"
    return Path("png", split, slug(concept), f"{style}-{background}.png")


def held_out_pairs(count: int, share: float = HELD_OUT_SHARE) -> set[tuple[int, str]]:
    """Return the held-out pairs of concept number and style.

    No concept loses more than one style, and the styles lose equally many concepts.
    """
    styles = list(STYLES)
    chosen = np.random.default_rng(SPLIT_SEED).permutation(count)
    pairs = round(count * len(styles) * share)
    return {(int(chosen[i]), styles[i % len(styles)]) for i in range(pairs)}


def read_icons(archive: Path, names: list[str]) -> dict[str, str]:
    """Return SVG documents by name from an icon set of ``@iconify-json``."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None
        icons = json.load(member)
    documents = {}
    for name in names:
        icon = icons["icons"][name]
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        documents[name] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
    return documents


def rasterise(svg: str, side: int) -> Image.Image:
    """Return an SVG document as an RGBA image of ``side`` pixels."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def read_3d(archive: Path, codes: list[str]) -> dict[str, Image.Image]:
    """Return the WebP images of the 3D style by code."""
    images = {}
    with tarfile.open(archive) as tar:
        for code in codes:
            member = tar.extractfile(f"package/assets/{code}.webp")
            assert member is not None
            images[code] = Image.open(io.BytesIO(member.read())).convert("RGBA")
    return images


def premultiplied(image: Image.Image, size: int = IMAGE_SIZE, margin: int = MARGIN) -> np.ndarray:
    """Return an RGBA image in the centre of a transparent square, averaged down to ``size``."""
    inner = size - 2 * margin
    pixels = np.asarray(image.resize((SCALE * inner, SCALE * inner), Image.Resampling.BICUBIC))
    pixels = pixels.astype(np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    small = pixels.reshape(inner, SCALE, inner, SCALE, 4).mean(axis=(1, 3))
    return np.pad(small, ((margin, margin), (margin, margin), (0, 0)))


def over(sprite: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    """Return a premultiplied sprite (H, W, 4) on a colour, uint8 (H, W, 3)."""
    blended = sprite[..., :3] + (1 - sprite[..., 3:]) * (np.array(colour, np.float32) / 255)
    return np.round(255 * blended.clip(0, 1)).astype(np.uint8)


def draw(packages: Path, concepts: list[Concept]) -> Iterator[Sprite]:
    """Yield the sprites of all concepts, style by style."""
    held_out = held_out_pairs(len(concepts))
    for style in STYLES:
        if style in ICON_SETS:
            icons = read_icons(packages / ICON_SETS[style].file, [c.icon for c in concepts])
            side = SCALE * (IMAGE_SIZE - 2 * MARGIN)
            images = [rasterise(icons[concept.icon], side) for concept in concepts]
        else:
            by_code = read_3d(packages / FLUENT_3D.file, [c.code for c in concepts])
            images = [by_code[concept.code] for concept in concepts]
        for number, (concept, image) in enumerate(zip(concepts, images, strict=True)):
            yield Sprite(concept, style, premultiplied(image), (number, style) in held_out)


def write(sprites: list[Sprite], out: Path) -> dict[str, int]:
    """Write images, sprites and the tar of captioned images; return the numbers of images."""
    rng = np.random.default_rng(SPLIT_SEED)
    counts = {"train": 0, "heldout": 0}
    (out / "tars").mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "tars" / "train.tar", "w") as tar:
        for sprite in sprites:
            for name, colour in BACKGROUNDS.items():
                split = "heldout" if sprite.held_out else "train"
                path = out / image_file(sprite.concept.name, sprite.style, name, sprite.held_out)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(over(sprite.pixels, colour)).save(path)
                counts[split] += 1
                if split == "heldout":
                    continue
                captions = training_captions(
                    sprite.concept, sprite.style, name, CAPTIONS_PER_IMAGE, rng
                )
                key = f"{slug(sprite.concept.name)}-{sprite.style}-{name}"
                _add(tar, f"{key}.png", path.read_bytes())
                _add(tar, f"{key}.txt", "\n".join(captions).encode())
    np.savez_compressed(
        out / "sprites.npz",
        pixels=np.round(255 * np.stack([s.pixels for s in sprites])).astype(np.uint8),
        concepts=[s.concept.name for s in sprites],
        styles=[s.style for s in sprites],
        held_out=[s.held_out for s in sprites],
    )
    return counts


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@dataclass(frozen=True)
class Sprites:
    """What ``sprites.npz`` contains.

    Attributes:
        pixels: (N, H, W, 4) float32 in [0, 1], colours multiplied by the opacity.
        concepts: (N,) numbers in ``concept_names``.
        styles: (N,) numbers in ``STYLES``.
        held_out: (N,) bool.
        concept_names: in the order of ``concepts.json``.
    """

    pixels: np.ndarray
    concepts: np.ndarray
    styles: np.ndarray
    held_out: np.ndarray
    concept_names: list[str]


def read_sprites(images: Path) -> Sprites:
    """Read ``sprites.npz`` of a folder that :func:`write` wrote.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = images / "sprites.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run emoji_images.py first")
    with np.load(path) as arrays:
        names = list(dict.fromkeys(arrays["concepts"].tolist()))
        return Sprites(
            pixels=arrays["pixels"].astype(np.float32) / 255,
            concepts=np.array([names.index(name) for name in arrays["concepts"].tolist()]),
            styles=np.array([list(STYLES).index(style) for style in arrays["styles"].tolist()]),
            held_out=arrays["held_out"],
            concept_names=names,
        )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Render captioned emoji in four styles.")
    parser.add_argument("--packages", type=Path, required=True, help="folder of packages.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--concepts", type=int, help="number of concepts (default: all)")
    args = parser.parse_args()
    concepts = read_concepts(args.concepts)
    counts = write(list(draw(args.packages, concepts)), args.out)
    print(
        f"{args.out}: {len(concepts)} concepts, {len(STYLES)} styles, {len(COLOURS)} backgrounds: "
        f"{counts['train']:,} training images, {counts['heldout']:,} of held-out pairs"
    )


if __name__ == "__main__":
    main()
