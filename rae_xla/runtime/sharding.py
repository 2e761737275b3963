"""Sharding rules: which dimension of which parameter is split over which axis of the mesh.

The rules are data, YAML files in ``configs/sharding``, one for the networks it names::

    networks: [DiTDH, LightningDiT]
    parameters:
      - pattern: '\\.w12\\.weight$'        # found in the parameter's name
        spec: [[fsdp, tensor], null]      # how it is stored: an entry for each dimension
        else: [null, [fsdp, tensor]]      # where that does not divide evenly
        used: [tensor, null]              # how a layer computes with it; left out: whole
    activations:
      - pattern: '^blocks\\.\\d+$'          # found in the name of the module that returns it
        spec: [batch]                     # entries left out are null; batch is [data, fsdp]
    blocks: '^blocks\\.\\d+$'              # the modules it is a stack of

The first rule found decides. A rule that matches nothing in its network is an error, and so is a
large parameter that no rule matches or that cannot be split as its rule says: either would cost
memory or bytes sent in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from rae_xla.errors import UserError
from rae_xla.runtime.mesh import AXES, BATCH
from rae_xla.runtime.stacked import names_in

Entry = str | tuple[str, ...] | None
PartitionSpec = tuple[Entry, ...]
"""For each dimension the axis or axes that split it; dimensions left out are whole."""

LARGE = 2**20
"""Elements from which a parameter must be covered by a rule: 4 MB in float32."""


@dataclass(frozen=True)
class ParameterRule:
    """How parameters whose names hold ``pattern`` are stored and used; see the module."""

    pattern: str
    spec: PartitionSpec
    otherwise: PartitionSpec | None = None
    used: PartitionSpec = ()


@dataclass(frozen=True)
class ActivationRule:
    """How what modules return is split, and the gradient of it."""

    pattern: str
    spec: PartitionSpec


@dataclass(frozen=True)
class NetworkRules:
    """The rules of one file."""

    file: str
    parameters: tuple[ParameterRule, ...] = ()
    activations: tuple[ActivationRule, ...] = ()
    blocks: str | None = None


@dataclass(frozen=True)
class Placement:
    """Where a parameter lives and how it is used, one entry for each of its dimensions."""

    stored: PartitionSpec
    used: PartitionSpec


@dataclass(frozen=True)
class Shardings:
    """What the rules say of every parameter and module of a model.

    Attributes:
        parameters: by name.
        activations: the spec of what a module returns, by the module's name.
        blocks: the names of the modules that networks are stacks of, in their order.
    """

    parameters: dict[str, Placement]
    activations: dict[str, PartitionSpec]
    blocks: list[str]


def load_rules(paths: Iterable[str]) -> dict[str, NetworkRules]:
    """Read rule files, or all of a folder; by the class names of the networks.

    Of two files that name the same network, the later one counts. A path that does not exist here
    is looked for in the checkout the package lies in.

    Raises:
        UserError: a file is missing or not of the form above.
    """
    rules: dict[str, NetworkRules] = {}
    for path in paths:
        found = _find(path)
        for file in sorted(found.glob("*.yaml")) if found.is_dir() else [found]:
            networks, of_file = _read(file)
            rules.update(dict.fromkeys(networks, of_file))
    return rules


def _find(path: str) -> Path:
    here, beside = Path(path), Path(__file__).parents[2] / path
    for place in (here, beside):
        if place.exists():
            return place
    raise UserError(
        f"mesh.sharding: {path} does not exist, neither here ({Path.cwd()}) nor beside the package "
        f"({beside.parent}): give files of sharding rules, or a folder of them"
    )


def _read(file: Path) -> tuple[list[str], NetworkRules]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"sharding rules {file} cannot be read: {error}") from error
    known = {"networks", "parameters", "activations", "blocks"}
    if not isinstance(content, Mapping) or set(content) - known or not content.get("networks"):
        raise UserError(
            f"sharding rules {file}: expected the keys networks (class names), parameters and "
            "activations (lists of rules), and blocks (a pattern)"
        )
    parameters = [_parameter_rule(rule, file) for rule in content.get("parameters") or ()]
    activations = [
        ActivationRule(_pattern(rule, file, {"spec"}), _spec(rule["spec"], rule, file))
        for rule in content.get("activations") or ()
    ]
    blocks = content.get("blocks")
    if blocks is not None:
        _pattern({"pattern": blocks}, file, set())
    return list(content["networks"]), NetworkRules(
        str(file), tuple(parameters), tuple(activations), blocks
    )


def _parameter_rule(rule: Any, file: Path) -> ParameterRule:
    pattern = _pattern(rule, file, {"spec"}, {"else", "used"})
    return ParameterRule(
        pattern,
        _spec(rule["spec"], rule, file),
        _spec(rule["else"], rule, file) if "else" in rule else None,
        _spec(rule.get("used", []), rule, file),
    )


def _pattern(rule: Any, file: Path, needed: set[str], allowed: set[str] | None = None) -> str:
    needed = needed | {"pattern"}
    keys = set(rule) if isinstance(rule, Mapping) else set()
    if not needed <= keys <= needed | (allowed or set()):
        raise UserError(
            f"sharding rules {file}: {rule!r} is no rule: expected the keys "
            f"{', '.join(sorted(needed))}"
            + (f", and if need be {', '.join(sorted(allowed))}" if allowed else "")
        )
    try:
        return re.compile(rule["pattern"]).pattern
    except (re.error, TypeError) as error:
        raise UserError(
            f"sharding rules {file}: pattern {rule['pattern']!r} is no regular expression: {error}"
        ) from error


def _spec(value: Any, rule: Any, file: Path) -> PartitionSpec:
    """Entries as YAML has them; ``batch`` stands for the axes of the batch."""
    spec: list[Entry] = []
    seen: list[str] = []
    for entry in value if isinstance(value, list) else [value]:
        names = entry if isinstance(entry, list) else [entry]
        axes = [axis for name in names for axis in (BATCH if name == "batch" else (name,))]
        if axes == [None]:
            spec.append(None)
            continue
        seen += axes
        spec.append(axes[0] if len(axes) == 1 else tuple(axes))
    if not isinstance(value, list) or set(seen) - set(AXES) or len(seen) != len(set(seen)):
        raise UserError(
            f"sharding rules {file}, pattern {rule['pattern']!r}: {value!r} is no partition spec: "
            f"expected a list with an entry for each dimension: null, one of {', '.join(AXES)}, "
            "batch, or a list of these, each axis at most once"
        )
    return tuple(spec)


def shard_count(entry: Entry, axis_sizes: Mapping[str, int]) -> int:
    """Parts that an entry of a spec cuts its dimension into."""
    axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(axis_sizes[axis] for axis in axes)


def without_single_axes(spec: PartitionSpec, axis_sizes: Mapping[str, int]) -> PartitionSpec:
    """A spec without the axes that have one device: they split nothing."""
    entries: list[Entry] = []
    for entry in spec:
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        axes = tuple(axis for axis in names if axis_sizes[axis] > 1)
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return tuple(entries)


def resolve_shardings(
    module: nn.Module, rules: Mapping[str, NetworkRules], axis_sizes: Mapping[str, int]
) -> Shardings:
    """Find the networks in a module and apply their rules.

    A parameter belongs to the innermost network around it that has rules. What belongs to none is
    whole on every device, and may not be large if it is trained.

    Args:
        module: a network, or what holds several.
        rules: by class name.
        axis_sizes: devices along each axis.

    Raises:
        UserError: a rule matches nothing, or a large parameter is not covered.
    """
    networks = find_networks(module, rules)
    result = Shardings({}, {}, [])
    matched: set[tuple[str, str]] = set()

    for stored_name, parameter in module.named_parameters():
        name, *others = names_in(stored_name)
        network, inner = _network_of(name, networks)
        shape = tuple(parameter.shape[1:] if others else parameter.shape)
        if network is None:
            if parameter.requires_grad and parameter.numel() >= LARGE:
                raise UserError(
                    f"no sharding rules cover {name} {shape}: add its network's class to a file of "
                    "mesh.sharding"
                )
            result.parameters[stored_name] = Placement(*[(None,) * parameter.dim()] * 2)
            continue
        rule = _first(networks[network].parameters, inner)
        if rule is not None:
            matched.add((network, rule.pattern))
        elif parameter.numel() >= LARGE:
            raise UserError(
                f"{networks[network].file}: no rule matches {inner} {shape}: add one (spec: [] "
                "keeps a copy on every device)"
            )
        placement = _placement(inner, shape, rule, axis_sizes, networks[network].file)
        if others:
            placement = Placement((None, *placement.stored), (None, *placement.used))
        result.parameters[stored_name] = placement
    for stored_name, _ in module.named_modules():
        name = names_in(stored_name)[0]
        network, inner = _network_of(name, networks, within=False)
        activation = _first(networks[network].activations, inner) if network is not None else None
        if network is not None and activation is not None:
            matched.add((network, activation.pattern))
            result.activations[stored_name] = without_single_axes(activation.spec, axis_sizes)
        blocks = networks[network].blocks if network is not None else None
        if network is not None and blocks is not None and re.search(blocks, inner):
            matched.add((network, blocks))
            result.blocks.append(stored_name)
    for network, of_network in networks.items():
        patterns = [rule.pattern for rule in of_network.parameters]
        patterns += [rule.pattern for rule in of_network.activations]
        for pattern in [*patterns, *filter(None, [of_network.blocks])]:
            if (network, pattern) not in matched:
                what = type(module.get_submodule(network)).__name__
                raise UserError(
                    f"{of_network.file}: pattern {pattern!r} matches nothing in {what}, or "
                    "only what an earlier rule takes: correct or remove it"
                )
    return result


def find_networks(module: nn.Module, rules: Mapping[str, NetworkRules]) -> dict[str, NetworkRules]:
    """The modules that have rules, by name; a subclass (FSDP2 makes one) has its parent's."""
    found: dict[str, NetworkRules] = {}
    for name, child in module.named_modules():
        known = [base.__name__ for base in type(child).__mro__ if base.__name__ in rules]
        if known:
            found[name] = rules[known[0]]
    return found


def _network_of(
    name: str, networks: Mapping[str, NetworkRules], *, within: bool = True
) -> tuple[str | None, str]:
    """The innermost network that holds a parameter or module, and its name inside it."""
    parts = name.split(".") if name else []
    for length in range(len(parts) - (1 if within else 0), -1, -1):
        prefix = ".".join(parts[:length])
        if prefix in networks:
            return prefix, ".".join(parts[length:])
    return None, name


def _first(rules: Sequence[Any], name: str) -> Any:
    return next((rule for rule in rules if re.search(rule.pattern, name)), None)


def _placement(
    name: str,
    shape: tuple[int, ...],
    rule: ParameterRule | None,
    axis_sizes: Mapping[str, int],
    file: str,
) -> Placement:
    whole: PartitionSpec = (None,) * len(shape)
    if rule is None:
        return Placement(whole, whole)
    used, *options = (
        without_single_axes(_padded(spec, shape, name, file), axis_sizes)
        for spec in (rule.used, rule.spec, rule.otherwise)
        if spec is not None
    )
    for spec in options:
        if all(s % shard_count(e, axis_sizes) == 0 for s, e in zip(shape, spec, strict=True)):
            return Placement(spec, used)
    if math.prod(shape) < LARGE:
        return Placement(whole, used)
    sizes = ", ".join(f"{axis} {size}" for axis, size in axis_sizes.items())
    raise UserError(
        f"{name} {shape} cannot be split evenly over the mesh ({sizes}) as {file} says: choose "
        "axes that divide its width (fewer on mesh.ici.fsdp, the others on mesh.ici.data)"
    )


def _padded(spec: PartitionSpec, shape: tuple[int, ...], name: str, file: str) -> PartitionSpec:
    if len(spec) > len(shape):
        raise UserError(
            f"{file}: the spec of {name} has {len(spec)} entries, but its shape is {shape}"
        )
    return spec + (None,) * (len(shape) - len(spec))
