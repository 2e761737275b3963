"""Sharding rules: map parameter names to mesh axes.

The rules are YAML files in ``configs/sharding``. Each file names the networks that it is for::

    networks: [DiTDH, LightningDiT]
    parameters:
      - pattern: '\\.w12\\.weight$'        # searched for in the name of the parameter
        spec: [[fsdp, tensor], null]      # how it is stored: one entry for each dimension
        else: [null, [fsdp, tensor]]      # used instead if spec does not divide the shape evenly
        used: [tensor, null]              # how a layer computes with it; default: replicated
    activations:
      - pattern: '^blocks\\.\\d+$'          # searched for in the name of the module
        spec: [batch]                     # of its output; batch stands for [data, fsdp]
    blocks: '^blocks\\.\\d+$'              # the modules that the network is a stack of

Missing entries of a spec are null. The first matching rule decides. A rule that matches nothing in
its network is an error, and so is a large parameter that no rule matches or that cannot be sharded
as its rule requires: both would waste memory or bandwidth silently.
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
from rae_xla.runtime.blocks import unstacked_names
from rae_xla.runtime.mesh import AXES, BATCH

Entry = str | tuple[str, ...] | None
PartitionSpec = tuple[Entry, ...]
"""For each dimension the axis or axes that shard it; missing dimensions are not sharded."""

LARGE = 2**20
"""Number of elements from which a parameter needs a rule: 4 MB in float32."""


@dataclass(frozen=True)
class ParameterRule:
    """How parameters whose names match ``pattern`` are stored and used; see the module."""

    pattern: str
    spec: PartitionSpec
    otherwise: PartitionSpec | None = None
    used: PartitionSpec = ()


@dataclass(frozen=True)
class ActivationRule:
    """How the outputs of modules are sharded, and their gradients."""

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
    """How one parameter is sharded.

    Attributes:
        stored: on the devices, one entry for each dimension.
        used: when a layer computes with it, one entry for each dimension.
    """

    stored: PartitionSpec
    used: PartitionSpec


@dataclass(frozen=True)
class Shardings:
    """The rules applied to one module.

    Attributes:
        parameters: placement of every parameter, by its name.
        activations: spec of a module's output, by the name of the module.
        blocks: names of the modules that networks are stacks of, in order.
    """

    parameters: dict[str, Placement]
    activations: dict[str, PartitionSpec]
    blocks: list[str]


def load_rules(paths: Iterable[str]) -> dict[str, NetworkRules]:
    """Read sharding rules.

    Args:
        paths: files, or folders whose ``*.yaml`` files are read. A relative path is searched for
            in the current folder, then in the checkout that contains this package.

    Returns:
        Rules by the class name of the network. Of two files for one network the later counts.

    Raises:
        UserError: a file is missing or invalid.
    """
    rules: dict[str, NetworkRules] = {}
    for path in paths:
        found = _find(path)
        files = sorted(found.glob("*.yaml")) if found.is_dir() else [found]
        if not files:
            raise UserError(
                f"mesh.sharding: the folder {found} has no .yaml files of sharding rules"
            )
        for file in files:
            networks, network_rules = _read(file)
            rules.update(dict.fromkeys(networks, network_rules))
    return rules


def _find(path: str) -> Path:
    checkout = Path(__file__).parents[2]
    for found in (Path(path), checkout / path):
        if found.exists():
            return found
    raise UserError(
        f"mesh.sharding: {path} does not exist in {Path.cwd()} or {checkout}: name files of "
        "sharding rules, or folders of them"
    )


def _read(file: Path) -> tuple[list[str], NetworkRules]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"sharding rules {file} cannot be read ({error}): correct the file"
        ) from error
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
            f"sharding rules {file}: {rule!r} is not a rule: expected the keys "
            f"{', '.join(sorted(needed))}"
            + (f", and optionally {', '.join(sorted(allowed))}" if allowed else "")
        )
    try:
        return re.compile(rule["pattern"]).pattern
    except (re.error, TypeError) as error:
        raise UserError(
            f"sharding rules {file}: pattern {rule['pattern']!r} is not a regular expression: "
            f"{error}"
        ) from error


def _spec(value: Any, rule: Any, file: Path) -> PartitionSpec:
    """Convert the YAML value of a spec; ``batch`` stands for the axes of the batch."""
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
            f"sharding rules {file}, pattern {rule['pattern']!r}: {value!r} is not a partition "
            f"spec: expected a list with one entry for each dimension (null, one of "
            f"{', '.join(AXES)}, batch, or a list of these), each axis at most once"
        )
    return tuple(spec)


def shard_count(entry: Entry, axis_sizes: Mapping[str, int]) -> int:
    """Return the number of shards that one entry of a spec divides its dimension into."""
    return math.prod(axis_sizes[axis] for axis in entry_axes(entry))


def entry_axes(entry: Entry) -> tuple[str, ...]:
    """Return the axes of one entry of a spec; none for null."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def without_single_axes(spec: PartitionSpec, axis_sizes: Mapping[str, int]) -> PartitionSpec:
    """Return a spec without the axes of one device, which shard nothing."""
    entries: list[Entry] = []
    for entry in spec:
        axes = tuple(axis for axis in entry_axes(entry) if axis_sizes[axis] > 1)
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return tuple(entries)


def resolve_shardings(
    module: nn.Module, rules: Mapping[str, NetworkRules], axis_sizes: Mapping[str, int]
) -> Shardings:
    """Apply the rules to every network in a module.

    The rules of a parameter are those of the innermost network that contains it. A parameter in no
    network is replicated; it must be small, or frozen.

    Args:
        module: a network, or a module that contains networks.
        rules: by the class name of the network.
        axis_sizes: number of devices along each axis.

    Raises:
        UserError: a rule matches nothing, or a large parameter cannot be sharded by the rules.
    """
    networks = find_networks(module, rules)
    result = Shardings({}, {}, [])
    matched: set[tuple[str, str]] = set()

    for stored_name, parameter in module.named_parameters():
        name, *others = unstacked_names(stored_name)  # others: the parameter is stacked
        network, inner = _network_of(name, networks)
        shape = tuple(parameter.shape[1:] if others else parameter.shape)
        if network is None:
            if parameter.requires_grad and parameter.numel() >= LARGE:
                raise UserError(
                    f"no sharding rules cover {name} {shape}: add the class of its network to a "
                    "file of mesh.sharding"
                )
            result.parameters[stored_name] = Placement(*[(None,) * parameter.dim()] * 2)
            continue
        rule = _first(networks[network].parameters, inner)
        if rule is not None:
            matched.add((network, rule.pattern))
        elif parameter.numel() >= LARGE:
            raise UserError(
                f"{networks[network].file}: no rule matches {inner} {shape}: add one (spec: [] "
                "replicates it)"
            )
        placement = _placement(inner, shape, rule, axis_sizes, networks[network].file)
        if others:
            placement = Placement((None, *placement.stored), (None, *placement.used))
        result.parameters[stored_name] = placement
    for stored_name, _ in module.named_modules():
        name = unstacked_names(stored_name)[0]
        network, inner = _network_of(name, networks, within=False)
        activation = _first(networks[network].activations, inner) if network is not None else None
        if network is not None and activation is not None:
            matched.add((network, activation.pattern))
            result.activations[stored_name] = without_single_axes(activation.spec, axis_sizes)
        blocks = networks[network].blocks if network is not None else None
        if network is not None and blocks is not None and re.search(blocks, inner):
            matched.add((network, blocks))
            result.blocks.append(stored_name)
    _raise_unmatched(module, networks, matched)
    return result


def _raise_unmatched(
    module: nn.Module, networks: Mapping[str, NetworkRules], matched: set[tuple[str, str]]
) -> None:
    """Raise if a pattern of a network was not used."""
    for network, network_rules in networks.items():
        patterns = [rule.pattern for rule in network_rules.parameters]
        patterns += [rule.pattern for rule in network_rules.activations]
        for pattern in [*patterns, *filter(None, [network_rules.blocks])]:
            if (network, pattern) not in matched:
                class_name = type(module.get_submodule(network)).__name__
                raise UserError(
                    f"{network_rules.file}: pattern {pattern!r} matches nothing in {class_name}, "
                    "or only names that an earlier rule matches: correct or remove it"
                )


def find_networks(module: nn.Module, rules: Mapping[str, NetworkRules]) -> dict[str, NetworkRules]:
    """Return the rules of every network in a module, by its name.

    A subclass has the rules of its parent; FSDP2 makes a subclass of each class that it shards.
    """
    found: dict[str, NetworkRules] = {}
    for name, child in module.named_modules():
        known = [base.__name__ for base in type(child).__mro__ if base.__name__ in rules]
        if known:
            found[name] = rules[known[0]]
    return found


def _network_of(
    name: str, networks: Mapping[str, NetworkRules], *, within: bool = True
) -> tuple[str | None, str]:
    """Return the innermost network that contains a parameter or module, and the name within it."""
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
    replicated: PartitionSpec = (None,) * len(shape)
    if rule is None:
        return Placement(replicated, replicated)
    used, *options = (
        without_single_axes(_padded(spec, shape, name, file), axis_sizes)
        for spec in (rule.used, rule.spec, rule.otherwise)
        if spec is not None
    )
    for spec in options:
        if all(s % shard_count(e, axis_sizes) == 0 for s, e in zip(shape, spec, strict=True)):
            return Placement(spec, used)
    if math.prod(shape) < LARGE:
        return Placement(replicated, used)
    sizes = ", ".join(f"{axis} {size}" for axis, size in axis_sizes.items())
    raise UserError(
        f"{name} {shape} does not divide evenly over the mesh ({sizes}) by the rules of {file}: "
        "choose axes that divide its width (a smaller mesh.ici.fsdp, a larger mesh.ici.data)"
    )


def _padded(spec: PartitionSpec, shape: tuple[int, ...], name: str, file: str) -> PartitionSpec:
    if len(spec) > len(shape):
        raise UserError(
            f"{file}: the spec of {name} has {len(spec)} entries, but its shape is {shape}: "
            "give one entry for each dimension"
        )
    return spec + (None,) * (len(shape) - len(spec))
