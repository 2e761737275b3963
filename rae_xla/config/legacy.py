"""Legacy key spellings: translation to the current schema while a file is loaded.

The reference implementation renamed its keys over time, and users keep their files. If one source
(a file, or the command line) gives both spellings of a key, the current one wins.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from rae_xla.config.raev2 import translate_raev2
from rae_xla.errors import UserError

logger = logging.getLogger(__name__)

Tree = dict[str, Any]

# Legacy key of `training` -> current keys below `training`, with dashes already replaced by
# underscores.
_SCHEDULE = {
    "base_lr": ("scheduler.base_lr", "optimizer.lr"),
    "final_lr": ("scheduler.final_lr",),
    "schedule_type": ("scheduler.type",),
    "warmup_epochs": ("scheduler.warmup_epochs",),
    "warmup_steps": ("scheduler.warmup_steps",),
    "warmup_from_zero": ("scheduler.warmup_from_zero",),
    # The rate is constant until the decay starts: a warm-up with warmup_from_zero false.
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
_RENAMED: dict[str, tuple[str, ...]] = {
    **{f"training.{old}": tuple(f"training.{n}" for n in new) for old, new in _SCHEDULE.items()},
    "training.log_interval": ("training.log_every",),
    "training.ckpt_every": ("checkpoint.every_steps",),
    "training.sample_interval": ("training.sample_every",),
    "training.num_workers": ("data.num_workers",),
    "training.cfg_scale": ("guidance.scale",),
}
for _section in ("training", "gan.disc"):
    _RENAMED |= {
        f"{_section}.optimizer.beta": (f"{_section}.optimizer.betas",),
        f"{_section}.optimizer.wd": (f"{_section}.optimizer.weight_decay",),
        f"{_section}.scheduler.schedule_type": (f"{_section}.scheduler.type",),
        f"{_section}.scheduler.decay_start_epoch": (f"{_section}.scheduler.warmup_epochs",),
        f"{_section}.scheduler.decay_start_steps": (f"{_section}.scheduler.warmup_steps",),
    }
_STEPS_NOT_EPOCHS = 100
"""A ``checkpoint_interval`` of at least this many, and above ``epochs``, counts steps."""

# Keys that the reference's stage-1 script adds to the file that it saves with a run.
_IGNORED = ("cmd_args", "experiment_dir", "checkpoint_dir")


def add_current_names(tree: Tree, where: str) -> Tree:
    """Copy the value of each legacy key to its current name; replace dashes by underscores.

    The legacy keys remain until :func:`drop_legacy_names`, so that interpolations such as
    ``${training.base_lr}`` resolve.

    Args:
        tree: settings as read.
        where: source of the settings, for error messages.

    Raises:
        UserError: if two legacy keys of the same meaning have different values.
    """
    tree = translate_raev2(_without_dashes(tree), where)
    _read_interval_in_steps(tree, where)
    sources: dict[str, tuple[str, Any]] = {}
    for old, new_names in _RENAMED.items():
        holder, leaf = _parent(tree, old)
        if leaf not in holder:
            continue
        value = holder[leaf]
        for new in new_names:
            other, other_value = sources.setdefault(new, (old, value))
            if other_value != value:
                raise UserError(
                    f"{other}: {other_value} and {old}: {value} ({where}) both set {new}: keep one"
                )
            _set_default(tree, new, value)
    return tree


def drop_legacy_names(tree: Tree) -> Tree:
    """Remove legacy keys, and normalise legacy forms of values."""
    for old in (*_RENAMED, *_IGNORED):
        holder, leaf = _parent(tree, old)
        holder.pop(leaf, None)
    for optimizer in _sections(tree, "training.optimizer", "gan.disc.optimizer"):
        betas = optimizer.get("betas")
        if isinstance(betas, float):  # the reference accepts one number for both
            optimizer["betas"] = [betas, betas]
        kind = str(optimizer.get("type", "adamw")).lower()
        if kind == "adamw":
            optimizer.pop("type", None)
        elif kind in ("muon", "gmuon"):  # the second in RAEv2
            optimizer["type"] = "muon"
    for sampler in _sections(tree, "sampler"):
        if isinstance(sampler.get("mode"), str):
            sampler["mode"] = sampler["mode"].upper()
    for params in _sections(tree, "sampler.params"):
        if params.get("last_step") == "None":  # published spelling
            params["last_step"] = None
    for params in _sections(tree, "stage_1.params"):
        path = params.get("encoder_config_path")
        # The published DINOv2-B_512.yaml has a stray quote at the end of this path.
        if isinstance(path, str) and path.count("'") == 1:
            params["encoder_config_path"] = path.rstrip("'")
    return tree


def _read_interval_in_steps(tree: Tree, where: str) -> None:
    """Move a ``training.checkpoint_interval`` that counts optimizer steps to ``every_steps``.

    The branches XLA and deprecated-gpu of the published code counted steps, the later ones count
    epochs. A file of those branches has ``sample_interval``, which later ones call
    ``sample_every``, or an interval far beyond the end of the run if it were in epochs.
    """
    training = tree.get("training")
    if not isinstance(training, dict):
        return
    interval, epochs = training.get("checkpoint_interval"), training.get("epochs")
    if type(interval) is not int:
        return
    beyond = type(epochs) is int and interval > epochs and interval >= _STEPS_NOT_EPOCHS
    if "sample_interval" not in training and not beyond:
        return
    del training["checkpoint_interval"]
    _set_default(tree, "checkpoint.every_steps", interval)
    logger.warning(
        "training.checkpoint_interval: %d (%s) counts steps, as in earlier published files, and is "
        "read as checkpoint.every_steps",
        interval,
        where,
    )


def _without_dashes(tree: Tree) -> Tree:
    return {
        k.replace("-", "_") if isinstance(k, str) else k: _without_dashes(v)
        if isinstance(v, dict)
        else v
        for k, v in tree.items()
    }


def _parent(tree: Tree, name: str) -> tuple[Tree, str]:
    """Return the section that contains a dotted name ({} if it is missing), and the last part."""
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
