"""What every host proves before step 1: that it is in the same run, and with its own rows."""

from __future__ import annotations

import functools
import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL
import torch
from torch import Tensor

import rae_xla
from rae_xla.data.mixture import Mixture
from rae_xla.data.stream import SampleStream
from rae_xla.errors import UserError
from rae_xla.runtime import Batch, Runtime

if TYPE_CHECKING:
    from rae_xla.config import RunConfig

_OF_A_HOST = (
    "data.train",
    "data.val",
    "data.cache_dir",
    "data.cache_gb",
    "data.num_workers",
    "data.prefetch",
    "runtime.compile_cache",
)
"""Settings that may differ from host to host: where things lie there, and what it can do."""


def check_hosts(
    runtime: Runtime, config: RunConfig, data: Mixture, stream: SampleStream, step: int
) -> None:
    """Make sure that all processes run the same code on the same data, each with its own rows.

    Args:
        runtime: started.
        config: of the run.
        data: the training shards as this host sees them.
        stream: this process's part of them.
        step: the first one to be taken.

    Raises:
        UserError: on every process, naming the hosts that differ and in what.
    """
    samples = stream.global_ids(step)[stream.first : stream.last]
    facts = {
        "code": code_version(),
        "configuration": _digest(_shared_settings(config)),
        "shards": _digest(data.fingerprint),
        "first step": str(step),
    }
    # Only of those that read the same bucket: others may have a copy.
    facts |= {f"objects of {s.folder}": _digest(s.generations) for s in data.sources}
    own = {"host": socket.gethostname(), "facts": facts, "samples": samples}
    hosts = [json.loads(text) for text in runtime.exchange(json.dumps(own))]
    for name in facts:
        _check_equal(name, hosts)
    everything = [sample for host in hosts for sample in host["samples"]]
    if everything != stream.global_ids(step):
        raise UserError(
            f"the {len(hosts)} processes together hold {len(everything)} rows of step {step}, "
            f"{len(set(everything))} different samples, which is not the global batch of "
            f"{len(stream.global_ids(step))}: this is a bug of rae_xla, please report it"
        )


def checked_rows(runtime: Runtime, batches: Iterator[Batch], global_batch: int) -> Iterator[Batch]:
    """Pass on batches on the devices; of the first, see that they hold every row of it once.

    Raises:
        UserError: rows are missing, or there twice.
    """
    checked = False
    for batch in batches:
        if not checked:
            _check_rows(runtime, batch["row"], global_batch)
            checked = True
        yield batch


def _check_rows(runtime: Runtime, rows: Tensor, global_batch: int) -> None:
    held = sorted(runtime.to_host({"row": rows})["row"].tolist())
    if held != list(range(global_batch)):
        raise UserError(
            f"the devices hold {len(set(held))} different rows of a batch of {global_batch}: the "
            "hosts' rows were not put together (each must load its own, minibatch=True); see that "
            "every process uses the same mesh"
        )


def _check_equal(name: str, hosts: list[dict[str, Any]]) -> None:
    """Raise unless all that say something say the same; most of them are taken to be right."""
    facts = {i: host["facts"][name] for i, host in enumerate(hosts) if name in host["facts"]}
    said = list(facts.values())
    usual = max(said, key=said.count)
    if others := [i for i, value in facts.items() if value != usual]:
        named = ", ".join(f"{hosts[i]['host']} (process {i}: {facts[i]})" for i in others[:4])
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        raise UserError(
            f"the hosts do not run the same: {name} of {named}{more} differs from the "
            f"{said.count(usual)} others' ({usual}). Make them equal and start again"
        )


def _shared_settings(config: RunConfig) -> dict[str, object]:
    settings = config.flat()
    return {
        key: value
        for key, value in settings.items()
        if not any(key == name or key.startswith(name + ".") for name in _OF_A_HOST)
    }


def code_version() -> str:
    """What decides a run's numbers beside its configuration: our source and two libraries."""
    return (
        f"rae_xla {rae_xla.__version__} {_code_hash()}, torch {torch.__version__}, "
        f"Pillow {PIL.__version__}"
    )


@functools.cache
def _code_hash() -> str:
    """Of the package's own source: a version number does not tell an edited checkout."""
    folder = Path(rae_xla.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
