"""Checks of the storage that a run writes to, and of the data that it reads."""

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
from torch import nn

from rae_xla import storage
from rae_xla.checkpoint.manager import checkpoints_folder
from rae_xla.config import RunConfig
from rae_xla.config.text_to_image import TextToImageConfig
from rae_xla.data.bad_samples import SampleError
from rae_xla.data.mixture import open_training_data
from rae_xla.data.reader import load_sample
from rae_xla.data.shards.index import ShardIndex, open_index
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import instantiate
from rae_xla.models.decoder import DecoderConfig, ViTDecoder
from rae_xla.models.text_to_image.language_model import read_lm_config
from rae_xla.storage import gcs_client
from rae_xla.tools.doctor.devices import MAX_SKEW
from rae_xla.tools.doctor.finding import DoctorContext, Finding
from rae_xla.train.tasks.text_to_image import TextToImageTask
from rae_xla.train.text_to_image_model import build_model, freeze

STORAGE, DATA = "storage", "data"

MIN_FREE_BYTES = 1e9
"""Bytes that should be free wherever a run writes logs, images or a profile."""


def check_storage(context: DoctorContext) -> Iterator[Finding]:
    """Write, read and delete a small file in every place that the run writes to."""
    config, results = context.config, context.results_dir
    if results is None:
        yield Finding(STORAGE, "results", "none", "no --results-dir given")
    locations = {
        "results": (None if results is None else str(results), MIN_FREE_BYTES),
        "checkpoints": (_checkpoints(config, results), _checkpoint_bytes(context)),
        "runtime.compile_cache": (config.runtime.compile_cache, MIN_FREE_BYTES),
        "data.cache_dir": (config.data.cache_dir, config.data.cache_gb * 1e9),
    }
    for name, (location, required) in locations.items():
        if location is not None:
            yield _check_location(name, location, required)
    written = [location for location, _ in locations.values() if location]
    if any(path.startswith("gs://") for path in (*written, *_data_folders(config))):
        yield _server_clock()


def _checkpoints(config: RunConfig, results: str | Path | None) -> str | None:
    return config.checkpoint.dir if results is None else checkpoints_folder(config, results)


def _check_location(name: str, location: str, required: float) -> Finding:
    """Check that a folder can be written to, and has ``required`` bytes free."""
    try:
        _write_and_read(location)
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fix = f"{name}: cannot write to {location} ({reason}): correct that, or set another path"
        return Finding(STORAGE, name, "FAIL", f"{location}: {reason}", fix)
    if storage.is_remote(location):
        text = f"{location}: an object was written, read and deleted"
        return Finding(STORAGE, name, "ok", text)
    free = shutil.disk_usage(_existing_folder(location)).free
    text = f"{location}: writable, {free / 1e9:.1f} GB free, up to {required / 1e9:.1f} GB needed"
    if free >= required:
        return Finding(STORAGE, name, "ok", text)
    fix = (
        f"{name}: {location} has {free / 1e9:.1f} GB free but may need {required / 1e9:.1f} GB: "
        "free some space"
    )
    if name == "checkpoints":
        fix += ", or lower checkpoint.keep_last"
    return Finding(STORAGE, name, "warn", text, fix)


def _write_and_read(location: str) -> None:
    """Write, read and delete a small file, in a parent folder if the folder does not exist yet."""
    folder = location if storage.is_remote(location) else _existing_folder(location)
    path = storage.join(folder, f"rae-xla-doctor-{uuid.uuid4().hex[:8]}")
    content = uuid.uuid4().bytes
    try:
        storage.write_bytes(path, content)
        if storage.read_bytes(path) != content:
            raise OSError(f"{path} has other content than was written")
    finally:
        with contextlib.suppress(FileNotFoundError, OSError):
            storage.remove(path)


def _existing_folder(location: str) -> str:
    """Return the folder, or its nearest existing ancestor."""
    folder = os.path.abspath(location)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"{folder} is not a folder")
    return folder


def _checkpoint_bytes(context: DoctorContext) -> float:
    """Return the bytes of the checkpoints that are kept, and of one that is being written.

    Each has weights, their average and two moments in fp32.
    """
    if not context.config_given:
        return MIN_FREE_BYTES
    settings = context.config.checkpoint
    return (settings.keep_last + 1) * 4 * 4 * trained_parameters(context.config)


def trained_parameters(config: RunConfig) -> int:
    """Count the parameters that a run trains; load nothing.

    Those of the text-to-image model, of the diffusion transformer, or else of the decoder.
    """
    model: nn.Module
    with torch.device("meta"):
        if config.text_to_image is not None and config.misc.latent_size is not None:
            return _trained_with_text(config, config.text_to_image, config.misc.latent_size)
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


def _trained_with_text(
    config: RunConfig, section: TextToImageConfig, latent_size: tuple[int, int, int]
) -> int:
    """Count the trained parameters of a text-to-image model; 0 if its sizes are not known here."""
    values = section.language_model_config
    if values is None and section.language_model is not None:
        with contextlib.suppress(UserError):  # the run will report it
            values = read_lm_config(section.language_model).to_dict()
    if values is None:  # of a checkpoint, which would have to be read
        return 0
    tokenizer = section.tokenizer or section.ckpt or section.language_model
    plain = replace(
        section,
        ckpt=None,
        language_model=None,
        language_model_config=values,
        tokenizer=tokenizer,
    )
    channels, height, width = latent_size
    model = build_model(replace(config, text_to_image=plain), channels, height * width)
    freeze(model, section.train)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _server_clock() -> Finding:
    """Compare this host's clock with that of the storage, which rejects a skewed signature."""
    address = gcs_client.emulator_url() or "https://storage.googleapis.com"
    try:
        with urllib.request.urlopen(address, timeout=10) as response:
            date = response.headers["Date"]
    except urllib.error.HTTPError as error:  # an error response has a date, too
        date = error.headers["Date"]
    except OSError as error:
        text = f"{address} does not respond: {error}"
        return Finding(STORAGE, "clock", "FAIL", text, f"{text}: check the network of this host")
    if date is None:
        return Finding(STORAGE, "clock", "none", f"{address} sends no date")
    skew = time.time() - parsedate_to_datetime(date).timestamp()
    text = f"{skew:+.0f} s against {address}"
    if abs(skew) <= MAX_SKEW + 1:  # the date has a resolution of 1 s
        return Finding(STORAGE, "clock", "ok", text)
    fix = f"this host's clock is off by {text}: synchronise it (`timedatectl set-ntp true`)"
    return Finding(STORAGE, "clock", "warn", text, fix)


def _data_folders(config: RunConfig) -> list[str]:
    train = config.data.train or ()
    return [train] if isinstance(train, str) else list(train)


def check_data(context: DoctorContext) -> Iterator[Finding]:
    """Open the shards, and decode their first and last image."""
    config = context.config
    folders = [("data.train", folder) for folder in _data_folders(config)]
    if config.data.val is not None:
        folders.append(("data.val", config.data.val))
    if not folders:
        yield Finding(DATA, "shards", "none", "data.train is not set")
    for name, folder in folders:
        try:
            index = open_index(folder)
            start = time.perf_counter()
            for sample in {0, len(index) - 1} if len(index) else ():
                load_sample(index, sample, CenterCrop(config.data.image_size), (0.5, 0.5))
            seconds = time.perf_counter() - start
            captions = _check_captions(config, folder, index)
        except (UserError, OSError, ValueError) as error:
            yield Finding(DATA, name, "FAIL", f"{folder}: {error}", f"{name}: {error}")
            continue
        yield Finding(
            DATA, name, "ok",
            f"{folder}: {len(index)} images of {index.num_classes} classes in {len(index.shards)} "
            f"shards; first and last decoded in {seconds:.2f} s{captions}",
        )  # fmt: skip


def _check_captions(config: RunConfig, folder: str, index: ShardIndex) -> str:
    """Make the rows of the first and the last sample of a text-to-image run.

    Returns:
        What was found, for the finding of the shards; empty for other runs.

    Raises:
        UserError: there are no captions, or the tokenizer cannot be used.
    """
    if config.text_to_image is None:
        return ""
    data = open_training_data(folder)
    rows = TextToImageTask.row_arrays(config, data)
    unusable = 0
    for sample in {0, len(data) - 1}:
        try:
            rows.arrays(0, sample, 0, 0)
        except SampleError:
            unusable += 1
    found = f"; {len(data)} samples with texts, first and last tokenised"
    return found + (f" ({unusable} of them cannot be used)" if unusable else "")
