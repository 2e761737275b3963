"""Write the results of the text-to-image quickstart as one page: ``report.html``.

    python scripts/quickstart_t2i/emoji_report.py --results results/quickstart_t2i

reads these files of the results folder:

    images/                              real emoji
    reconstructed/                       the same emoji after encoding and decoding
    prompts/                             what was asked for
    generated/scale{1,2,3}/              generated emoji
    stage1/metrics.jsonl, t2i/metrics.jsonl
    judge.json                           written by emoji_judge.py
    times.tsv                            "step<TAB>seconds" lines, written by quickstart_t2i.sh
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from emoji_captions import STYLES
from emoji_images import BACKGROUNDS, Sprites, over, read_sprites
from emoji_judge import read_generated, read_reconstructed, table
from emoji_prompts import HELD_OUT, TRAINED, UNSEEN, Prompt, read_prompts
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "quickstart"))
from page import clock, html_table, plot_losses, read_times, tile

TEMPLATE = Path(__file__).with_name("emoji_report.template.html")
PANELS = {
    "stage1": "Stage 1: the decoder (L1 on pixels)",
    "t2i": "Text to image: the head (velocity)",
}
# What the quickstart is held to.
GOALS = {
    "concept": 0.95,
    "style": 0.75,
    "background": 0.98,
    "held-out concept": 0.90,
    "unseen concept": 0.70,
    "psnr": 22.5,
    "minutes": 15.0,
}
SHOWN = {TRAINED: 12, UNSEEN: 12, HELD_OUT: 3}
"""Every how many prompts of a set one is shown."""
# From this share of copies on, the page says that the model memorised its training images.
MANY_COPIES = 0.5


def image_tag(image: np.ndarray, text: str) -> str:
    """Return a uint8 image (H, W, 3) as the HTML of an embedded PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(text)}">'


def figure(images: Sequence[np.ndarray], caption: str) -> str:
    """Return images side by side above their caption, as HTML."""
    inner = "".join(image_tag(image, caption) for image in images)
    return f"<figure><div>{inner}</div><figcaption>{escape(caption)}</figcaption></figure>"


def real_image(sprites: Sprites, prompt: Prompt) -> np.ndarray:
    """Return the real image that a prompt describes."""
    concept = sprites.concept_names.index(prompt.concept)
    style = list(STYLES).index(prompt.style)
    [row] = np.flatnonzero((sprites.concepts == concept) & (sprites.styles == style))
    return over(sprites.pixels[row], BACKGROUNDS[prompt.background])


def gallery(
    prompts: Sequence[Prompt], images: np.ndarray, kind: str, sprites: Sprites | None = None
) -> str:
    """Return prompts of a set with their images, as HTML; with ``sprites`` next to real ones."""
    chosen = [i for i, prompt in enumerate(prompts) if prompt.set == kind][:: SHOWN[kind]]
    figures = []
    for i in chosen:
        real = [] if sprites is None else [real_image(sprites, prompts[i])]
        figures.append(figure([images[i], *real], prompts[i].text))
    return "".join(figures)


def row_named(verdict: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a row of judge.json."""
    return next(row for row in verdict["rows"] if row["name"] == name)


def tiles(verdict: Mapping[str, Any], seconds: float) -> str:
    """Return the numbers at the top of the page, each with its goal and whether it was reached."""
    trained = row_named(verdict, f"{TRAINED}, guidance 2")
    held_out = row_named(verdict, f"{HELD_OUT}, guidance 2")
    unseen = row_named(verdict, f"{UNSEEN}, guidance 2")
    decoded = row_named(verdict, "reconstructed, held-out pairs")
    numbers = [
        ("Right concept", trained["concept"], GOALS["concept"], "{:.0%}"),
        ("Right style", trained["style"], GOALS["style"], "{:.0%}"),
        ("Right background", trained["background"], GOALS["background"], "{:.0%}"),
        ("Right concept, held-out pairs", held_out["concept"], GOALS["held-out concept"], "{:.0%}"),
        ("Right concept, new words", unseen["concept"], GOALS["unseen concept"], "{:.0%}"),
        ("Reconstruction", decoded["psnr"], GOALS["psnr"], "{:.1f} dB"),
    ]
    shown = [
        tile(title, form.replace(".0", ".1").format(value), form.format(goal), value >= goal)
        for title, value, goal, form in numbers
    ]
    if seconds:
        goal = f"{GOALS['minutes']:.0f} min on 2 CPU cores"
        met = seconds <= 60 * GOALS["minutes"]
        shown.append(tile("Time, all steps", f"{clock(seconds)} min", goal, met))
    return "".join(shown)


def memorised(verdict: Mapping[str, Any]) -> str:
    """Say in plain words how much of the training images the model repeats."""
    row = row_named(verdict, f"{TRAINED}, guidance 2")
    held_out = row_named(verdict, f"{HELD_OUT}, guidance 2")
    between = verdict["psnr_between_draws"]["guidance 1"]
    draws = (
        f"Two draws of one prompt, without guidance, agree to {between:.1f} dB PSNR. A prompt "
        "describes exactly one training image, so nearly equal draws are what it was taught."
    )
    composed = (
        f"Only the held-out pairs show composition: there, the concept is right in "
        f"{held_out['concept']:.0%} of the images and the style in {held_out['style']:.0%}."
    )
    if row["copies"] >= MANY_COPIES:
        first = (
            f"The model has memorised its training images: for prompts about trained pairs, "
            f"{row['copies']:.0%} of the generated images are nearest to the very training image "
            f"that the prompt describes, at {row['psnr_to_training']:.1f} dB PSNR on average."
        )
    else:
        first = (
            f"For prompts about trained pairs, {row['copies']:.0%} of the generated images are "
            "nearest to the very training image that the prompt describes: most are not copies."
        )
    return f"{first} {draws} {composed}"


def write_report(folder: Path) -> Path:
    """Write the page into ``folder`` and return its path."""
    verdict = json.loads((folder / "judge.json").read_text())
    sprites = read_sprites(folder / "images")
    prompts = read_prompts(folder / "prompts" / "all.json")
    images = read_generated(folder / "generated" / "scale2")
    real, decoded, asked = read_reconstructed(folder / "reconstructed", sprites, held_out=True)
    pairs = [
        figure([real[i], decoded[i]], f"{sprites.concept_names[asked[i][0]]}, {style}")
        # A step of 7 of 6 backgrounds shows a pair once, each on another background.
        for i in range(0, len(real), 7)
        for style in [list(STYLES)[asked[i][1]]]
    ]
    plot_losses(folder, PANELS, folder / "losses.png")

    times = read_times(folder / "times.tsv")
    seconds = sum(value for _, value in times)
    timing = ""
    if times:
        shown = [(name, clock(value)) for name, value in [*times, ("total", seconds)]]
        timing = f'<div class="card scroll">{html_table(("step", "min:s"), shown)}</div>'
    head, *rows = table(verdict["rows"])
    config = json.loads((folder / "encoder" / "config.json").read_text())
    side = config["image_size"] // config["patch_size"]
    page = Template(TEMPLATE.read_text()).substitute(
        train_count=f"{len(BACKGROUNDS) * int((~sprites.held_out).sum()):,}",
        concept_count=len(sprites.concept_names),
        tiles=tiles(verdict, seconds),
        trained=gallery(prompts, images, TRAINED),
        unseen=gallery(prompts, images, UNSEEN),
        held_out=gallery(prompts, images, HELD_OUT, sprites),
        reconstructed="".join(pairs),
        image_size=config["image_size"],
        latent_shape=f"{config['hidden_size']} x {side} x {side}",
        table=html_table(head, rows),
        memorised=escape(memorised(verdict)),
        times=timing,
        folder=escape(str(folder)),
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write report.html from the results.")
    parser.add_argument(
        "--results", type=Path, required=True, help="results folder of the quickstart"
    )
    print(write_report(parser.parse_args().results))


if __name__ == "__main__":
    main()
