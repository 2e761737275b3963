"""Consistency checks between hosts: same code, configuration and data, disjoint rows."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rae_xla.checkpoint.provenance import code_version
from rae_xla.data.loader import TrainingLoader
from rae_xla.data.mixture import Mixture
from rae_xla.errors import UserError
from rae_xla.runtime import Backend, Batch

if TYPE_CHECKING:
    from rae_xla.config import RunConfig

_HOST_SETTINGS = (
    "data.train",
    "data.val",
    "data.cache_dir",
    "data.cache_gb",
    "data.num_workers",
    "data.prefetch",
    "runtime.compile_cache",
)
"""Settings that may differ between hosts: local paths and capacities."""


def check_hosts(
    backend: Backend, config: RunConfig, data: Mixture, loader: TrainingLoader, step: int
) -> None:
    """Check that all processes run the same code on the same data, each with its own rows.

    Args:
        backend: of the run.
        config: of the run.
        data: the training shards as read by this host.
        loader: loads this process's share of them.
        step: the first step.

    Raises:
        UserError: on every process, with the hosts that differ and the property they differ in.
    """
    samples = loader.global_ids(step)[loader.first : loader.last]
    facts = {
        "code": code_version(),
        "configuration": _digest(_shared_settings(config)),
        "shards": _digest(data.fingerprint),
        "first step": str(step),
    }
    # Only sources in a bucket have generations: hosts may have local copies of the others.
    facts |= {f"objects of {s.folder}": _digest(s.generations) for s in data.sources}
    own = {"host": socket.gethostname(), "facts": facts, "samples": samples}
    hosts = [json.loads(text) for text in backend.all_gather_text(json.dumps(own))]
    for name in facts:
        _check_equal(name, hosts)
    everything = [sample for host in hosts for sample in host["samples"]]
    if everything != loader.global_ids(step):
        raise UserError(
            f"the {len(hosts)} processes together hold {len(everything)} rows of step {step}, "
            f"{len(set(everything))} different samples, which is not the global batch of "
            f"{len(loader.global_ids(step))}: this is a bug of rae_xla, please report it"
        )


def checked_rows(backend: Backend, batches: Iterator[Batch], global_batch: int) -> Iterator[Batch]:
    """Yield device batches, after checking that the first holds every row exactly once.

    Raises:
        UserError: rows are missing or duplicated.
    """
    checked = False
    for batch in batches:
        if not checked:
            _check_rows(backend, batch["row"], global_batch)
            checked = True
        yield batch


def _check_rows(backend: Backend, rows: Tensor, global_batch: int) -> None:
    held = sorted(backend.to_host({"row": rows})["row"].tolist())
    if held != list(range(global_batch)):
        raise UserError(
            f"the devices hold {len(set(held))} different rows of a batch of {global_batch}: the "
            "rows of the hosts were not assembled into one global batch; check that every process "
            "uses the same mesh"
        )


def _check_equal(name: str, hosts: list[dict[str, Any]]) -> None:
    """Raise unless all hosts report the same value; the most frequent one counts as right."""
    facts = {i: host["facts"][name] for i, host in enumerate(hosts) if name in host["facts"]}
    values = list(facts.values())
    usual = max(values, key=values.count)
    if others := [i for i, value in facts.items() if value != usual]:
        named = ", ".join(f"{hosts[i]['host']} (process {i}: {facts[i]})" for i in others[:4])
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        raise UserError(
            f"the hosts do not run the same job: {name} of {named}{more} differs from that of the "
            f"{values.count(usual)} others ({usual}). Make them equal and start again"
        )


def _shared_settings(config: RunConfig) -> dict[str, object]:
    settings = config.flat()
    return {
        key: value
        for key, value in settings.items()
        if not any(key == name or key.startswith(name + ".") for name in _HOST_SETTINGS)
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
