"""The names of all metrics that a run logs; the table in docs/monitoring.md is generated from them.

A name is a group, a slash and the metric: ``train/`` from the steps, ``opt/`` their learning rates,
``perf/`` speed, ``eval/`` quality, ``samples/`` images, ``data/`` input, ``ckpt/`` checkpoints.
``train/disc/...`` is about the discriminator, ``eval/model/...`` about the weights that are not
averaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

SKIPPED = "/skipped"
"""The ending of metrics that count skipped steps."""

METRIC_GROUPS = ("train", "opt", "perf", "eval", "samples", "data", "ckpt")


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of them.

    Attributes:
        name: as it is logged; ``*`` matches any suffix.
        unit: empty for a plain number.
        description: for the docs and the report.
    """

    name: str
    unit: str
    description: str


METRICS = (
    Metric("train/loss", "", "the loss that is minimised"),
    Metric("train/grad_norm", "", "L2 norm of the gradient before clipping"),
    Metric(
        "train/skipped",
        "steps",
        "steps without an update, because the loss or the gradient was not finite or the gradient "
        "norm exceeded `training.skip_grad_norm`",
    ),
    Metric(
        "train/rollbacks",
        "",
        "on a separate line: how many times in a row the run rolled back to a checkpoint",
    ),
    Metric("train/epoch", "epochs", "passes over the training data so far"),
    Metric("train/l1", "", "stage 1: mean absolute pixel error"),
    Metric("train/lpips", "", "stage 1: perceptual distance"),
    Metric("train/gan", "", "stage 1: GAN loss of the decoder"),
    Metric("train/adaptive_weight", "", "stage 1: weight of the GAN loss relative to the others"),
    Metric("train/disc/loss", "", "stage 1: loss of the discriminator"),
    Metric("train/disc/grad_norm", "", "stage 1: L2 norm of the discriminator's gradient"),
    Metric("train/disc/skipped", "steps", "stage 1: steps without a discriminator update"),
    Metric("train/disc/accuracy", "fraction", "stage 1: logits that are higher for the real image"),
    Metric("train/disc/logits_real", "", "stage 1: mean logit of real images"),
    Metric("train/disc/logits_fake", "", "stage 1: mean logit of reconstructions"),
    Metric("train/text_loss", "", "t2i: cross-entropy of the supervised tokens"),
    Metric("train/image_loss", "", "t2i: flow-matching loss of the images that are generated"),
    Metric("train/token_accuracy", "fraction", "t2i: supervised tokens that are predicted"),
    Metric("train/truncated", "fraction", "t2i: rows whose text was cut to `text_to_image.length`"),
    Metric("train/loss/*", "", "t2i with several data sources: loss of the rows of each"),
    Metric("train/grad_norm/*", "", "t2i: L2 norm of the gradient of each group of parameters"),
    Metric("opt/lr", "", "learning rate of the last step"),
    Metric("opt/lr_language_model", "", "t2i: learning rate of the language model"),
    Metric("opt/disc_lr*", "", "stage 1: learning rate of the discriminator updates"),
    Metric(
        "opt/disc_count", "updates", "stage 1: discriminator updates before those of the last step"
    ),
    Metric("perf/step_time", "s", "time from one step to the next"),
    Metric("perf/images_per_second", "1/s", "throughput of the whole run"),
    Metric(
        "perf/images_per_second_per_chip", "1/s", "throughput of the run divided by its devices"
    ),
    Metric(
        "perf/mfu",
        "fraction",
        "model FLOPs utilisation: the model's FLOPs relative to the peak of the devices, see below",
    ),
    Metric(
        "perf/host_time",
        "s",
        "time per step in which the main thread worked: it transferred the batch and traced or "
        "launched the step. The rest of the step it waited",
    ),
    Metric(
        "perf/data_wait", "fraction", "time spent waiting for the next batch, relative to the total"
    ),
    Metric(
        "perf/paused",
        "s",
        "time spent on checkpoints, previews and evaluations since the previous line",
    ),
    Metric(
        "perf/compilations",
        "graphs",
        "graphs compiled since the process started. A phase compiles its step once; previews and "
        "evaluations have their own graphs, compiled at first use. Otherwise it must not grow",
    ),
    Metric(
        "perf/captures",
        "count",
        "calls of compiled functions that were traced in Python so far; two for each function, then"
        " the compiled program is run again without tracing (XLA)",
    ),
    Metric(
        "perf/fallbacks",
        "operations",
        "operations that ran on the host instead of the device since the process started. It must "
        "be 0",
    ),
    Metric(
        "perf/memory_gb",
        "10^9 bytes",
        "memory of the fullest device: on CUDA the peak, on a TPU what is in use",
    ),
    Metric(
        "perf/host_memory_gb",
        "10^9 bytes",
        "memory of the main process. Unbounded growth is a memory leak",
    ),
    Metric(
        "eval/*",
        "",
        "every `eval.eval_interval` steps, of the averaged weights: `eval/psnr` (dB), `eval/ssim`, "
        "`eval/lpips` and `eval/rfid` in stage 1, `eval/fid` and related metrics in stage 2: "
        "[evaluation.md](evaluation.md); validation losses in t2i: "
        "[text_to_image.md](text_to_image.md)",
    ),
    Metric("eval/model/*", "", "the same for the weights themselves, with `eval.eval_model=true`"),
    Metric("samples/*", "images", "every `training.sample_every` steps, also in `samples/`"),
    Metric(
        "data/bad_samples",
        "samples",
        "samples that were replaced since the process started (of process 0's rows)",
    ),
    Metric("ckpt/blocked_seconds", "s", "time for which the last checkpoint blocked training"),
    Metric("ckpt/seconds", "s", "time from the start of the last checkpoint to its commit"),
    Metric(
        "ckpt/failed",
        "saves",
        "saves that failed since the previous line; they are retried: "
        "[checkpoints.md](checkpoints.md)",
    ),
)


def unknown_names(names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that are not listed in ``METRICS``."""
    return [n for n in names if not any(fnmatchcase(n, metric.name) for metric in METRICS)]


def markdown_table() -> str:
    """Return ``METRICS`` as the table in docs/monitoring.md."""
    rows = "".join(
        f"| `{metric.name.replace('*', '…')}` | {metric.unit} | {metric.description} |\n"
        for metric in METRICS
    )
    return "| name | unit | |\n|---|---|---|\n" + rows
