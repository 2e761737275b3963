"""The names of all figures a run logs: the one list, from which the table in the docs is made.

A name is a room, a slash and a word: ``train/`` what the steps measured, ``opt/`` what they were
told, ``perf/`` how fast they went, ``eval/`` quality, ``samples/`` pictures, ``data/`` and
``ckpt/`` what reading and saving went through. ``train/disc/…`` are of the discriminator and
``eval/model/…`` of the weights that are not averaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

SKIPPED = "/skipped"
"""How the names of figures end that count steps left out."""

ROOMS = ("train", "opt", "perf", "eval", "samples", "data", "ckpt")


@dataclass(frozen=True)
class Figure:
    """One figure, or a family of them.

    Attributes:
        name: as it is logged; ``*`` stands for any end.
        unit: empty for a bare number.
        about: what it is, for the docs.
    """

    name: str
    unit: str
    about: str


FIGURES = (
    Figure("train/loss", "", "what is minimised"),
    Figure("train/grad_norm", "", "the gradient's norm before clipping"),
    Figure(
        "train/skipped",
        "steps",
        "that changed nothing: their loss or gradient was not finite, or the gradient above "
        "`training.skip_grad_norm`",
    ),
    Figure(
        "train/rollbacks",
        "",
        "in a line of its own: how often in a row the run went back to a checkpoint",
    ),
    Figure("train/epoch", "passes", "over the training data, so far"),
    Figure("train/l1", "", "stage 1: mean absolute error of the pixels"),
    Figure("train/lpips", "", "stage 1: perceptual distance"),
    Figure("train/gan", "", "stage 1: the decoder's part of the GAN loss"),
    Figure("train/adaptive_weight", "", "stage 1: of the GAN loss against the others"),
    Figure("train/disc/loss", "", "stage 1: of the discriminator"),
    Figure("train/disc/grad_norm", "", "stage 1: of the discriminator"),
    Figure("train/disc/skipped", "steps", "stage 1: in which the discriminator was left as it was"),
    Figure("train/disc/accuracy", "share", "stage 1: of logits that are higher for the real image"),
    Figure("train/disc/logits_real", "", "stage 1: mean for real images"),
    Figure("train/disc/logits_fake", "", "stage 1: mean for reconstructions"),
    Figure("opt/lr", "", "learning rate of the last step"),
    Figure("opt/disc_lr*", "", "stage 1: learning rate of the discriminator's updates"),
    Figure("opt/disc_count", "updates", "stage 1: of the discriminator, before the last step's"),
    Figure("perf/step_time", "s", "from one step to the next"),
    Figure("perf/images_per_second", "1/s", "of the whole run"),
    Figure("perf/images_per_second_per_chip", "1/s", "of the whole run, divided by its devices"),
    Figure("perf/mfu", "share", "of the chips' peak that the model's arithmetic takes: see below"),
    Figure(
        "perf/host_time",
        "s",
        "of each step in which the main thread worked: it sent the batch and recorded or launched "
        "the step. The rest it waited",
    ),
    Figure("perf/data_wait", "share", "of the time in which the next batch was not there yet"),
    Figure(
        "perf/paused", "s", "spent on checkpoints, pictures and evaluations, since the line before"
    ),
    Figure(
        "perf/compilations",
        "graphs",
        "compiled since the process began. A phase compiles its step once; pictures and "
        "evaluations have graphs of their own, compiled when they are first made. Otherwise it "
        "must not grow",
    ),
    Figure(
        "perf/fallbacks",
        "operations",
        "that left the devices, since the process began. It must be 0",
    ),
    Figure(
        "perf/memory_gb",
        "10^9 bytes",
        "of the fullest device: on CUDA the most there ever was, on a TPU what is in use",
    ),
    Figure(
        "perf/host_memory_gb",
        "10^9 bytes",
        "of the main process. If it grows without end, something leaks",
    ),
    Figure(
        "eval/*",
        "",
        "every `eval.eval_interval` steps, of the averaged weights: `eval/psnr` (dB), `eval/ssim`, "
        "`eval/lpips`, `eval/rfid` of stage 1, and `eval/fid` and its like of stage 2: "
        "[evaluation.md](evaluation.md)",
    ),
    Figure("eval/model/*", "", "the same of the weights themselves, with `eval.eval_model=true`"),
    Figure("samples/*", "pictures", "every `training.sample_every` steps, also in `samples/`"),
    Figure(
        "data/bad_samples",
        "samples",
        "that had to be replaced, since the process began (of process 0's rows)",
    ),
    Figure("ckpt/blocked_seconds", "s", "for which the last checkpoint held up the training"),
    Figure("ckpt/seconds", "s", "from its beginning until it was safe on the storage"),
    Figure(
        "ckpt/failed",
        "saves",
        "that failed since the line before; they are tried again: [checkpoints.md](checkpoints.md)",
    ),
)


def unknown_names(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are not in the list."""
    return [n for n in names if not any(fnmatchcase(n, figure.name) for figure in FIGURES)]


def markdown_table() -> str:
    """The list as the table in ``docs/monitoring.md``."""
    rows = "".join(
        f"| `{figure.name.replace('*', '…')}` | {figure.unit} | {figure.about} |\n"
        for figure in FIGURES
    )
    return "| name | unit | |\n|---|---|---|\n" + rows
