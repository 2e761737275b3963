"""``rae-xla generate``: pictures of the classes you name."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rae_xla.cli.options import check_out_folder
from rae_xla.errors import UserError
from rae_xla.sample import GENERATED_FILE

if TYPE_CHECKING:
    from rae_xla.sample.pictures import Pixels
    from rae_xla.sample.pipeline import Pipeline

GRID_FILE, UNFINISHED = "grid.png", ".unfinished"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a published model (ditdh-xl-256, the default; ditdh-xl-512; either with "
        "-autoguidance), a YAML file, a results folder of stage 2, or a folder or hub id that "
        "save_pretrained wrote",
    )
    parser.add_argument(
        "--rae", metavar="MODEL", help="autoencoder of the last (default: its folder rae)"
    )
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--class-ids", metavar="N,N", help="classes by number, such as 207,388")
    classes.add_argument(
        "--classes", metavar="NAME,NAME", help='by name, such as "golden retriever,giant panda"'
    )
    parser.add_argument(
        "--class-names",
        metavar="FILE",
        help="names by label (default: of a run, its data's; of 1,000 classes ImageNet's)",
    )
    parser.add_argument(
        "--num-samples", type=int, default=8, metavar="N", help="pictures in all (default: 8)"
    )
    parser.add_argument(
        "--cfg-scale", type=float, metavar="S", help="guidance; 1: none (default: the model's)"
    )
    parser.add_argument(
        "--num-steps",
        type=int,
        metavar="N",
        help="points of the time grid (default: 50; of an SDE 250)",
    )
    parser.add_argument("--mode", choices=("ode", "sde"), help="default: the model's (ode)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where PNGs go")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="try the installation: a tiny model of random weights, which draws noise; no download",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, as runtime.precision=bf16"
    )


def run(args: argparse.Namespace) -> int:
    """Draw, then write."""
    _claim(args.out)
    if args.smoke and args.model:
        raise UserError("--smoke has a model of its own: leave --model out")
    if not args.smoke:
        return _generate(args, args.model or "ditdh-xl-256")
    from rae_xla.sample.tiny_model import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        return _generate(args, str(write_tiny_model(Path(folder))))


def _generate(args: argparse.Namespace, model: str) -> int:
    from rae_xla.data.class_names import read_class_names
    from rae_xla.progress import progress_bar
    from rae_xla.sample import pipeline as named
    from rae_xla.sample.find_model import find_model

    # all that a user may have mistyped, before gigabytes are downloaded
    settings = named.sampling_overrides(args.cfg_scale, args.num_steps, args.mode)
    found = find_model(model, [*args.overrides, *settings], args.rae)
    given = read_class_names(args.class_names) if args.class_names else None
    names = named.names_of_classes(found, given)
    labels = named.choose_labels(_classes(args), names, args.num_samples, args.seed)
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    pipeline = named.build_pipeline(found, names)
    runtime, guidance = pipeline.sampler.runtime, pipeline.config.guidance
    speaks = runtime.process_index == 0
    if speaks:
        how = f"{guidance.method} {guidance.scale:g}" if guidance.scale > 1 else "no guidance"
        print(f"{len(labels)} pictures, {how}, seed {args.seed}, on {runtime.description}")
    with progress_bar(desc="draw", unit="step", disable=not speaks) as bar:

        def report(done: int, steps: int) -> None:
            bar.total = steps
            bar.update(done - bar.n)

        pixels = pipeline.draw(labels, seed=args.seed, batch_size=args.batch_size, progress=report)
    if speaks:
        _write(args, pipeline, labels, pixels)
        print(f"{args.out}: {len(labels)} PNGs and {GRID_FILE}")
        if args.smoke:
            print(
                "This was a test of the installation: the model is tiny and its weights are "
                "random, so the pictures are noise. Without --smoke a published model draws."
            )
    return 0


def _classes(args: argparse.Namespace) -> list[str | int]:
    """What --class-ids or --classes say."""
    if args.class_ids is not None:
        try:
            return [int(word) for word in args.class_ids.split(",")]
        except ValueError:
            raise UserError(
                f"--class-ids {args.class_ids}: expected numbers such as 207,388; names go with "
                "--classes"
            ) from None
    if args.classes is not None:
        words = [word.strip() for word in args.classes.split(",")]
        if not all(words):
            raise UserError(f"--classes {args.classes!r}: expected names with commas between them")
        return list(words)
    return []


def _claim(out: Path) -> None:
    """Refuse a folder with anything in it but what an earlier command of this kind wrote."""
    check_out_folder(out)
    ours = {GENERATED_FILE, GRID_FILE, *_written(out)}
    others = sorted(p.name for p in out.iterdir() if p.name.removesuffix(UNFINISHED) not in ours)
    if others:
        raise UserError(
            f"--out {out} has other files in it ({', '.join(others[:3])}): give a folder that is "
            "empty, or one that an earlier `rae-xla generate` wrote"
        )


def _written(out: Path) -> list[str]:
    """The pictures that an earlier command wrote there."""
    try:
        listed = json.loads((out / GENERATED_FILE).read_text(encoding="utf-8"))
        return [str(picture["file"]) for picture in listed["pictures"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _write(args: argparse.Namespace, pipeline: Pipeline, labels: list[int], pixels: Pixels) -> None:
    """The list, which says how the pictures were made, the pictures, and the sheet of them."""
    from rae_xla.sample.captioned_grid import captioned_grid
    from rae_xla.sample.pictures import save_png

    names = [pipeline.class_names[label] for label in labels]
    slugs = [re.sub(r"\W+", "-", name.lower()).strip("-") for name in names]
    files = [f"{i:03d}-{slug}.png" for i, slug in enumerate(slugs)]
    captions = [
        name if name == str(label) else f"{name} ({label})"
        for name, label in zip(names, labels, strict=True)
    ]
    config = pipeline.config
    listed: dict[str, Any] = {
        "model": "random weights" if args.smoke else args.model or "ditdh-xl-256",
        "seed": args.seed,
        "sampler": config.to_dict()["sampler"],
        "guidance": {"method": config.guidance.method, "scale": config.guidance.scale},
        "pictures": [
            {"file": file, "label": label, "class": name}
            for file, label, name in zip(files, labels, names, strict=True)
        ],
    }
    for old in set(_written(args.out)) - set(files):
        (args.out / old).unlink(missing_ok=True)
    # the list first: if this is interrupted, the next command knows what is whose
    unfinished = args.out / f"{GENERATED_FILE}{UNFINISHED}"
    unfinished.write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(args.out / GENERATED_FILE)
    for file, picture in zip(files, pixels, strict=True):
        save_png(args.out / file, picture)
    save_png(args.out / GRID_FILE, captioned_grid(pixels, labels, captions))
