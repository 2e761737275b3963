"""Time a stage-1 step in each phase: L1, then with LPIPS, the discriminator, the GAN term.

    python benchmarks/gan_step.py [--scale digits|S] [--backends torch;...] [--batch N] [key=value]

One run of ``rae-xla train stage1`` per backend goes through all four phases; each result is the
median of the ``perf/step_time`` logged in a phase. Ratios are relative to the first phase of the
backend.
``--scale S`` is the published recipe (ViT-XL decoder, DINOv2-B, DINO S/8, 256 px) with random
weights; on a GPU: ``--scale S --backends torch --batch 64 runtime.precision=bf16``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import yaml
from world import BACKENDS, ROOT, SCALES, make_world, rae_xla

sys.path.insert(0, str(ROOT / "scripts" / "quickstart"))
from random_loss_networks import RECIPE, write_dino, write_vgg16

EPOCH, EPOCHS = 4, 2  # steps per epoch, epochs per phase
PHASES = ("L1", "+ LPIPS", "+ discriminator trains", "+ GAN")


def add_losses(path: Path, folder: Path, recipe: str | dict[str, int]) -> None:
    """Add a GAN section to a configuration, whose losses start one after another."""
    config = yaml.safe_load(path.read_text())
    shape = recipe if isinstance(recipe, dict) else {"depth": 12, "embed_dim": 384,
                                                     "num_heads": 6, "patch_size": 8}  # fmt: skip
    config["weights"] = {"vgg16": str(write_vgg16(folder / "vgg16.pth"))}
    arch = {"dino_ckpt_path": str(write_dino(folder / "dino.pth", shape)), "recipe": recipe}
    starts = {"lpips_start": EPOCHS, "disc_upd_start": 2 * EPOCHS, "disc_start": 3 * EPOCHS}
    losses = {"disc_weight": 0.75, "perceptual_weight": 1.0}
    config["gan"] = {"disc": {"arch": arch}, "loss": losses | starts}
    path.write_text(yaml.safe_dump(config))


def main() -> None:
    """Run all phases on every backend and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="digits")
    parser.add_argument(
        "--backends", default=";".join(BACKENDS), help="names, separated by semicolons"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    steps = EPOCH * EPOCHS * len(PHASES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_world(folder, SCALES[args.scale], images=EPOCH * args.batch)
        add_losses(config, folder, RECIPE if args.scale == "digits" else "S_8")
        print(f"{'backend':<16}{'losses':<24}{'ms/step':>10}{'images/s':>10}{'ratio':>8}")
        for number, backend in enumerate(args.backends.split(";")):
            results = folder / str(number)
            rae_xla(
                "train", "stage1", "--config", config, "--results-dir", results,
                f"training.global_batch_size={args.batch}", f"training.steps={steps}",
                "training.log_every=1", f"checkpoint.every_steps={steps}",
                *BACKENDS[backend], *args.overrides,
            )  # fmt: skip
            lines = [json.loads(x) for x in (results / "metrics.jsonl").read_text().splitlines()]
            first = None
            for phase, losses in enumerate(PHASES):
                begin = phase * EPOCH * EPOCHS
                timed = lines[begin + 2 : begin + EPOCH * EPOCHS]  # the first one compiles
                seconds = statistics.median(line["perf/step_time"] for line in timed)
                first = first or seconds
                print(
                    f"{backend:<16}{losses:<24}{1e3 * seconds:>10.1f}"
                    f"{args.batch / seconds:>10.1f}{seconds / first:>8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
