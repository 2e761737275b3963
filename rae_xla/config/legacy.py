"""Older spellings into the present ones, so that everything after loading sees one schema.

The reference changed its keys over time and users keep their files. A present key, where both
are given in one place, is believed before an older one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rae_xla.errors import UserError

Tree = dict[str, Any]

# Older key -> the keys that say it now. Dashes have become underscores before this is read.
_SCHEDULE = {
    "base_lr": ("scheduler.base_lr", "optimizer.lr"),
    "final_lr": ("scheduler.final_lr",),
    "schedule_type": ("scheduler.type",),
    "warmup_epochs": ("scheduler.warmup_epochs",),
    "warmup_steps": ("scheduler.warmup_steps",),
    "warmup_from_zero": ("scheduler.warmup_from_zero",),
    # Constant until the decay starts: what the scheduler now calls a warm-up not from zero.
    "decay_start_epoch": ("scheduler.warmup_epochs",),
    "decay_start_steps": ("scheduler.warmup_steps",),
    "decay_end_epoch": ("scheduler.decay_end_epoch",),
    "decay_end_steps": ("scheduler.decay_end_steps",),
    "lr": ("optimizer.lr",),
    "beta": ("optimizer.betas",),
    "betas": ("optimizer.betas",),
    "wd": ("optimizer.weight_decay",),
    "weight_decay": ("optimizer.weight_decay",),
}
_MOVED: dict[str, tuple[str, ...]] = {
    **{f"training.{old}": tuple(f"training.{n}" for n in new) for old, new in _SCHEDULE.items()},
    "training.log_interval": ("training.log_every",),
    "training.ckpt_every": ("checkpoint.every_steps",),
    "training.num_workers": ("data.num_workers",),
    "training.cfg_scale": ("guidance.scale",),
}
for _part in ("training", "gan.disc"):
    _MOVED |= {
        f"{_part}.optimizer.beta": (f"{_part}.optimizer.betas",),
        f"{_part}.optimizer.wd": (f"{_part}.optimizer.weight_decay",),
        f"{_part}.scheduler.schedule_type": (f"{_part}.scheduler.type",),
        f"{_part}.scheduler.decay_start_epoch": (f"{_part}.scheduler.warmup_epochs",),
        f"{_part}.scheduler.decay_start_steps": (f"{_part}.scheduler.warmup_steps",),
    }
# Notes the reference's stage-1 script adds to the file it saves with a run.
_DROPPED = ("cmd_args", "experiment_dir", "checkpoint_dir")


def add_present_names(tree: Tree, where: str) -> Tree:
    """Dashes in keys become underscores, and each older key's value is added under its new name.

    The older keys stay, for ``${training.base_lr}`` to find, until :func:`drop_older_names`.

    Raises:
        UserError: two older keys of one meaning have different values; ``where`` they stand.
    """
    tree = _without_dashes(tree)
    said: dict[str, tuple[str, Any]] = {}
    for old, new_names in _MOVED.items():
        holder, leaf = _parent(tree, old)
        if leaf not in holder:
            continue
        value = holder[leaf]
        for new in new_names:
            other, its = said.setdefault(new, (old, value))
            if its != value:
                raise UserError(
                    f"{other}: {its} and {old}: {value} ({where}) both mean {new}: keep one"
                )
            _set_default(tree, new, value)
    return tree


def drop_older_names(tree: Tree) -> Tree:
    """Remove what :func:`add_present_names` has copied; tidy values the reference also takes."""
    for old in (*_MOVED, *_DROPPED):
        holder, leaf = _parent(tree, old)
        holder.pop(leaf, None)
    for optimizer in _sections(tree, "training.optimizer", "gan.disc.optimizer"):
        betas = optimizer.get("betas")
        if isinstance(betas, float):  # one number for both
            optimizer["betas"] = [betas, betas]
        if str(optimizer.get("type", "adamw")).lower() == "adamw":  # there is no other
            optimizer.pop("type", None)
    for sampler in _sections(tree, "sampler"):
        if isinstance(sampler.get("mode"), str):
            sampler["mode"] = sampler["mode"].upper()
    for params in _sections(tree, "stage_1.params"):
        path = params.get("encoder_config_path")
        # The published DINOv2-B_512.yaml has a quote at the end of this path and none before.
        if isinstance(path, str) and path.count("'") == 1:
            params["encoder_config_path"] = path.rstrip("'")
    return tree


def _without_dashes(tree: Tree) -> Tree:
    return {
        k.replace("-", "_") if isinstance(k, str) else k: _without_dashes(v)
        if isinstance(v, dict)
        else v
        for k, v in tree.items()
    }


def _parent(tree: Tree, name: str) -> tuple[Tree, str]:
    """The section that holds a dotted name (an empty one where there is none), and its leaf."""
    *path, leaf = name.split(".")
    for part in path:
        inner = tree.get(part)
        tree = inner if isinstance(inner, dict) else {}
    return tree, leaf


def _set_default(tree: Tree, name: str, value: Any) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree.setdefault(leaf, value)


def _sections(tree: Tree, *names: str) -> Iterator[Tree]:
    for name in names:
        holder, leaf = _parent(tree, name)
        if isinstance(holder.get(leaf), dict):
            yield holder[leaf]
