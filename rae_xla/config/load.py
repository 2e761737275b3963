"""Loading of a :class:`RunConfig` from a YAML file and ``key=value`` overrides.

Precedence: defaults < base < file < overrides. Legacy spellings are translated, OmegaConf merges
and interpolates, values that follow from the models are filled in, and the result is validated.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rae_xla.config.legacy import Tree, add_current_names, drop_legacy_names
from rae_xla.config.paths import LOCAL, parse_path
from rae_xla.config.run import RunConfig
from rae_xla.config.typed import Origin, build
from rae_xla.config.validation import complete, validate
from rae_xla.errors import UserError


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the configuration of a run.

    Args:
        path: YAML file, or None for the defaults. Its key ``base`` may name another file, relative
            to its own folder, whose settings it changes.
        overrides: ``key=value`` with dotted keys, such as ``training.optimizer.lr=1e-4``;
            ``base=FILE`` replaces the base of ``path``.

    Returns:
        The complete, validated configuration. Paths in it are relative to the working directory,
        not to the file.

    Raises:
        UserError: if the file is missing or malformed, a key is unknown, a value has the wrong
            type or is out of range, or settings contradict each other.
    """
    changes = add_current_names(_parse(overrides), "on the command line")
    base = changes.pop("base", None)
    if base is not None:
        base = Path(parse_path(str(base), "base (on the command line)", LOCAL))
    file = {}
    if path is not None:
        path = parse_path(path, "the configuration file", LOCAL)
        file = _read_with_base(Path(path), base)
    origin = Origin(
        None if path is None else str(path), frozenset(_keys(file)), frozenset(_keys(changes))
    )
    given = drop_legacy_names(_merge(file, changes, origin))
    _reject_unsupported(given, origin)
    config = build(RunConfig, given, origin)
    _reject_ineffective_lr(given, origin)
    config = complete(config, given, origin)
    validate(config, origin)
    return config


def _read_with_base(path: Path, base: Path | None = None, above: tuple[Path, ...] = ()) -> Tree:
    """Read a file, merged onto ``base`` or onto the base that the file names.

    ``above`` are the files whose base this is, to detect a cycle.
    """
    tree = add_current_names(_read(path), f"in {path}")
    named = tree.pop("base", None)
    if named is not None and not isinstance(named, str):
        raise UserError(f"base (in {path}): expected the path of a YAML file, got {named!r}")
    if base is None and named is not None:
        base = path.parent / parse_path(named, f"base (in {path})", LOCAL)
    if base is None:
        return tree
    chain = (*above, path.resolve())
    if base.resolve() in chain:
        raise UserError(
            f"base (in {path}): {base} has this file as its base: the bases form a cycle"
        )
    inherited = _read_with_base(base, None, chain)
    try:
        merged = OmegaConf.merge(inherited, tree)
    except TypeError:  # see _merge
        return {**inherited, **tree}
    return cast(Tree, OmegaConf.to_container(merged, resolve=False))


def _read(path: Path) -> Tree:
    if not path.is_file():
        raise UserError(_missing(path))
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_syntax(error)}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as a YAML file: {error}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} has no sections: expected stage_1, stage_2, training, …")
    return cast(Tree, content)


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder; expected a YAML file"
    if not path.parent.is_dir():
        return f"no config file {path}: the folder {path.parent} does not exist"
    names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    hint = f". Similar names in that folder: {', '.join(near)}" if near else ""
    return f"no config file {path}{hint}"


def _syntax(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).split("\n", 1)[0]
    return f"{where}: not valid YAML: {problem}"


def _parse(overrides: Sequence[str]) -> Tree:
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override {text!r}: expected key=value, such as training.epochs=2")
    try:
        parsed = OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"overrides {list(overrides)}: {_one_line(error)}") from error
    return cast(Tree, OmegaConf.to_container(parsed, resolve=False))


def _merge(file: Tree, changes: Tree, origin: Origin) -> Tree:
    """Merge file and overrides, and resolve ``${…}``, which may refer to defaults."""
    try:
        given = OmegaConf.merge(OmegaConf.create(file), OmegaConf.create(changes))
        full = OmegaConf.merge(OmegaConf.create(RunConfig().to_dict()), given)
        resolved = OmegaConf.to_container(full, resolve=True)
    except TypeError:  # a list where a section must be, which ``build`` reports by its key
        return {**file, **changes}
    except OmegaConfBaseException as error:
        raise UserError(f"{origin.file or 'overrides'}: {_one_line(error)}") from error
    return cast(Tree, _select(resolved, OmegaConf.to_container(given, resolve=False)))


def _select(resolved: Any, given: Any) -> Any:
    """Return the part of ``resolved`` whose keys are in ``given``."""
    if isinstance(resolved, dict) and isinstance(given, dict):
        return {k: _select(resolved[k], given[k]) for k in given}
    return resolved


# Settings of other implementations that are not supported: key, values (None: any), and reason.
_UNSUPPORTED: tuple[tuple[str, tuple[str, ...] | None, str], ...] = (
    (
        "runtime.precision",
        ("fp16", "float16", "16"),
        "fp16 needs loss scaling, which is not implemented: write bf16, or fp32",
    ),
    (
        "transport.params.time_dist_shift",
        None,
        "the shift is sqrt(dim / base) of misc.time_dist_shift_dim and misc.time_dist_shift_base:"
        " set the base instead",
    ),
    (
        "gan.disc.optimizer.type",
        None,
        "AdamW is the only optimizer of the discriminator: leave this out",
    ),
)


def _reject_unsupported(given: Tree, origin: Origin) -> None:
    for key, values, reason in _UNSUPPORTED:
        value = _lookup(given, key)
        if value is not None and (values is None or str(value) in values):
            raise UserError(f"{key} ({origin.describe(key)}) is {value}: {reason}")


def _reject_ineffective_lr(given: Tree, origin: Origin) -> None:
    """Raise if ``base_lr`` of the file would replace an ``optimizer.lr`` of the command line."""
    overridden, effective = "training.optimizer.lr", "training.scheduler.base_lr"
    if overridden not in origin.overridden or effective in origin.overridden:
        return
    rate, base = _lookup(given, overridden), _lookup(given, effective)
    if base is not None and base != rate:
        raise UserError(
            f"{overridden}={rate} would have no effect: {effective} is {base} (in {origin.file})"
            f" and replaces it. Set {effective} instead"
        )


def _lookup(tree: Tree, key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _keys(tree: Tree, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in tree.items():
        keys += _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return keys


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).strip().splitlines())
