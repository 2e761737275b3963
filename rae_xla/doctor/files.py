"""Storage that must take what a run writes, and data that it must be able to read."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path

import torch

from rae_xla.config import RunConfig
from rae_xla.data import gcs, storage
from rae_xla.data.index import open_index
from rae_xla.data.reader import load_sample
from rae_xla.data.transforms import CenterCrop
from rae_xla.doctor.devices import MAX_SKEW
from rae_xla.doctor.finding import Finding, Patient
from rae_xla.errors import UserError
from rae_xla.models.vit_decoder import DecoderConfig, ViTDecoder
from rae_xla.registry import instantiate

STORAGE, DATA = "storage", "data"

SPARE = 1e9
"""Bytes that should be free wherever a run writes: logs, pictures, a profile."""


def check_storage(patient: Patient) -> Iterator[Finding]:
    """Write a little where the run writes, see that it is there, and delete it again."""
    config, results = patient.config, patient.results
    if results is None:
        yield Finding(STORAGE, "results", "none", "no --results-dir was given")
    places = {
        "results": (None if results is None else str(results), SPARE),
        "checkpoints": (_checkpoints(config, results), _checkpoint_bytes(patient)),
        "runtime.compile_cache": (config.runtime.compile_cache, SPARE),
        "data.cache_dir": (config.data.cache_dir, config.data.cache_gb * 1e9),
    }
    for name, (place, need) in places.items():
        if place is not None:
            yield _place(name, place, need)
    remote = {p for p in (*(p for p, _ in places.values()), *_data_folders(config)) if p}
    if any(p.startswith("gs://") for p in remote):
        yield _server_clock()


def _checkpoints(config: RunConfig, results: Path | None) -> str | None:
    if config.checkpoint.dir is not None or results is None:
        return config.checkpoint.dir
    return str(results / "checkpoints")


def _place(name: str, place: str, need: float) -> Finding:
    """One place that is written to, with the bytes that it should have room for."""
    try:
        _try_out(place)
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fix = f"{name}: {place} cannot be written ({reason}): see to that, or name another place"
        return Finding(STORAGE, name, "FAIL", f"{place}: {reason}", fix)
    if storage.is_remote(place):
        return Finding(STORAGE, name, "ok", f"{place}: an object written, read and deleted")
    free = shutil.disk_usage(_existing(place)).free
    text = f"{place}: writable, {free / 1e9:.1f} GB free, up to {need / 1e9:.1f} GB needed"
    if free >= need:
        return Finding(STORAGE, name, "ok", text)
    fix = f"{name}: {place} has {free / 1e9:.1f} GB free and may need {need / 1e9:.1f}: make room"
    if name == "checkpoints":
        fix += ", or lower checkpoint.keep_last"
    return Finding(STORAGE, name, "warn", text, fix)


def _try_out(place: str) -> None:
    """Write, read and delete a small file; a folder that is not there yet is not made."""
    folder = place if storage.is_remote(place) else _existing(place)
    path = storage.join(folder, f"rae-xla-doctor-{uuid.uuid4().hex[:8]}")
    content = uuid.uuid4().bytes
    try:
        storage.write_bytes(path, content)
        if storage.read_bytes(path) != content:
            raise OSError(f"{path} was read with other bytes than were written")
    finally:
        with contextlib.suppress(FileNotFoundError, OSError):
            storage.remove(path)


def _existing(place: str) -> str:
    """The folder itself, or the nearest one above it."""
    folder = os.path.abspath(os.path.expanduser(place))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"{folder} is a file")
    return folder


def _checkpoint_bytes(patient: Patient) -> float:
    """What the checkpoints that are kept take, and one more that is being written: weights, average
    and two moments in fp32.
    """
    if not patient.named:
        return SPARE
    settings = patient.config.checkpoint
    return (settings.keep_last + 1) * 4 * 4 * trained_parameters(patient.config)


def trained_parameters(config: RunConfig) -> int:
    """Of the diffusion transformer, or of the decoder where there is none; nothing is loaded."""
    with torch.device("meta"):
        if config.stage_2 is not None:
            model = instantiate(replace(config.stage_2, ckpt=None))
        elif config.stage_1 is not None and config.misc.latent_size is not None:
            params = config.stage_1.params
            channels, side, _ = config.misc.latent_size
            shape = DecoderConfig.read(
                params["decoder_config_path"],
                hidden_size=channels,
                patch_size=params["decoder_patch_size"],
            )
            model = ViTDecoder(shape, side * side)
        else:
            return 0
    return sum(p.numel() for p in model.parameters())


def _server_clock() -> Finding:
    """This host's clock against that of the storage, which refuses requests signed too early."""
    address = gcs.emulator() or "https://storage.googleapis.com"
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:  # an answer all the same
        date = error.headers["Date"]
    except OSError as error:
        text = f"{address} does not answer: {error}"
        return Finding(STORAGE, "clock", "FAIL", text, f"{text}: see to the network of this host")
    if date is None:
        return Finding(STORAGE, "clock", "none", f"{address} does not say what time it is")
    skew = time.time() - parsedate_to_datetime(date).timestamp()
    text = f"{skew:+.0f} s against {address}"
    if abs(skew) <= MAX_SKEW + 1:  # a date has whole seconds
        return Finding(STORAGE, "clock", "ok", text)
    fix = f"this host's clock is {text}: set it by a time server (`timedatectl set-ntp true`)"
    return Finding(STORAGE, "clock", "warn", text, fix)


def _data_folders(config: RunConfig) -> list[str]:
    train = config.data.train or ()
    return [train] if isinstance(train, str) else list(train)


def check_data(patient: Patient) -> Iterator[Finding]:
    """Open the shards and decode the first and the last image of them."""
    config = patient.config
    folders = [("data.train", folder) for folder in _data_folders(config)]
    if config.data.val is not None:
        folders.append(("data.val", config.data.val))
    if not folders:
        yield Finding(DATA, "shards", "none", "no data.train is named")
    for name, folder in folders:
        try:
            index = open_index(folder)
            began = time.perf_counter()
            for sample in {0, len(index) - 1}:
                load_sample(index, sample, CenterCrop(config.data.image_size), (0.5, 0.5))
            took = time.perf_counter() - began
        except (UserError, OSError, ValueError) as error:
            yield Finding(DATA, name, "FAIL", f"{folder}: {error}", f"{name}: {error}")
            continue
        yield Finding(
            DATA, name, "ok",
            f"{folder}: {len(index)} images of {index.num_classes} classes in {len(index.shards)} "
            f"shards; first and last decoded in {took:.2f} s",
        )  # fmt: skip
