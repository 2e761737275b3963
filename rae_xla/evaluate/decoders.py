"""The same sampled latents through several decoders: gFID of each, and how far they differ."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.evaluate.chunks import chunk_rows, on_devices
from rae_xla.evaluate.frechet import MomentStream, frechet_distance
from rae_xla.evaluate.image_metrics import psnr
from rae_xla.evaluate.inception import FeatureNetwork
from rae_xla.evaluate.reference import Reference
from rae_xla.interop.checkpoint_tensors import open_weights
from rae_xla.models.rae import RAE
from rae_xla.models.weights import load_strict
from rae_xla.progress import progress_bar
from rae_xla.runtime import Batch, Runtime
from rae_xla.sample.pictures import Pixels, to_grid, to_pixels
from rae_xla.sample.reconstruct import with_decoder

Latents = NDArray[np.float32]
SHOWN = 10


@dataclass(frozen=True)
class DecoderResult:
    """One decoder's figures."""

    name: str
    path: str
    fid: float | None
    """gFID against the reference; None where it was not asked for."""
    psnr_to_first: float
    """Mean PSNR in dB of its pictures against the first decoder's; 100 for equal ones."""


@dataclass(frozen=True)
class DecoderReport:
    """What was decoded, by what, against what."""

    results: tuple[DecoderResult, ...]
    num_images: int
    image_size: int
    reference: Reference | None
    grid: Pixels
    """The first latents, a row per decoder."""
    warnings: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "decoders": [vars(result) for result in self.results],
            "num_images": self.num_images,
            "image_size": self.image_size,
            "reference": self.reference.describe() if self.reference else None,
            "warnings": list(self.warnings),
        }


def open_latents(path: Path, rae: RAE) -> Latents:
    """The latents that ``rae-xla sample --keep-latents`` wrote, read as they are needed.

    Raises:
        UserError: no such file, another shape than the autoencoder's, or rows that are missing.
    """
    if not path.is_file():
        raise UserError(
            f"--latents {path}: there is no such file; `rae-xla sample ... --keep-latents` writes "
            "latents.npy beside its pictures"
        )
    try:
        latents: Latents = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"--latents {path} is not a readable .npy file: {error}") from error
    if isinstance(latents, np.lib.npyio.NpzFile):
        raise UserError(f"--latents {path} is an .npz file; give the .npy file of the latents")
    shape = (len(latents) if latents.ndim else 0, *rae.latent_size)
    if latents.dtype != np.float32 or latents.shape != shape or not len(latents):
        raise UserError(
            f"--latents {path}: {latents.dtype} {latents.shape}; this autoencoder decodes float32 "
            f"(N, {', '.join(map(str, rae.latent_size))}): take the configuration they were "
            "sampled with"
        )
    for row in range(len(latents)):
        if not latents[row, 0].any():  # one channel tells, and a set may have 40 GB
            raise UserError(
                f"--latents {path}: row {row} of {len(latents)} was never written; give the same "
                "`rae-xla sample` command again, and it draws what is missing"
            )
    return latents


def load_decoders(rae: RAE, paths: Sequence[str]) -> dict[str, nn.Module]:
    """Decoders from bare weight files, on the host, by a name each: the file's, or its whole path
    where two files have the same.

    Raises:
        UserError: a file that is missing or no bare decoder of this architecture.
    """
    stems = [Path(path).stem for path in paths]
    alike = len(set(stems)) < len(stems)
    found: dict[str, nn.Module] = {}
    for path, stem in zip(paths, stems, strict=True):
        state = open_weights(path, "--decoders")
        bare = isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
        if not bare or any(str(key).startswith("decoder.") for key in state):
            raise UserError(
                f"--decoders: {path} is a checkpoint or a whole autoencoder, not a decoder alone; "
                f"`rae-xla export decoder --ckpt {path} --out decoder.pt` takes the decoder out"
            )
        decoder = copy.deepcopy(rae.decoder)
        load_strict(decoder, state, f"--decoders: {path}")
        name = str(path) if alike else stem
        if name in found:
            raise UserError(f"--decoders: {path} is given twice")
        found[name] = decoder.requires_grad_(False)
    return found


def compare_decoders(
    rae: RAE,
    runtime: Runtime,
    latents: Latents,
    decoders: Mapping[str, nn.Module],
    paths: Sequence[str],
    *,
    features: FeatureNetwork | None,
    reference: Reference | None,
) -> DecoderReport:
    """Decode every latent with every decoder and compare what comes out.

    Pixels are cut off to 8 bits, as in the sample sets the latents come from.

    Args:
        rae: placed; its latent statistics are used, its own decoder is not.
        runtime: where it is.
        latents: (N, C, h, w) float32, normalised, as ``RAE.decode`` takes them.
        decoders: placed, by name; all of them are on the devices at once.
        paths: their files, for the report.
        features: for gFID; None without it.
        reference: what gFID compares with.
    """
    names = list(decoders)
    decode = {n: _decoding(with_decoder(rae, d), runtime) for n, d in decoders.items()}
    moments = {name: MomentStream() for name in names}
    ratios: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    shown: dict[str, list[Pixels]] = {name: [] for name in names}
    rows = chunk_rows(runtime)
    parts = (latents[start : start + rows] for start in range(0, len(latents), rows))
    total = -(-len(latents) // rows)
    quiet = runtime.process_index != 0
    seen = 0
    chunks = on_devices(runtime, parts)
    for part, chunk in progress_bar(chunks, total=total, unit="chunk", disable=quiet):
        made = {name: decode[name](chunk) for name in names}
        results: dict[str, Batch] = {name: {"pixels": made[name]} for name in names}
        if features is not None:
            for name in names:
                results[name]["features"] = features(made[name])
        fetched = {name: runtime.to_host(results[name]) for name in names}
        first = fetched[names[0]]["pixels"][: len(part)].numpy()
        for name in names:
            pixels = fetched[name]["pixels"][: len(part)].numpy()
            ratios[name].append(psnr(first, pixels))
            if features is not None:
                moments[name].add(fetched[name]["features"][: len(part)])
            shown[name] += list(pixels[: max(0, SHOWN - seen)])
        seen += len(part)
    fids: dict[str, float | None] = dict.fromkeys(names)
    warning = None
    if features is not None and reference is not None:
        assert reference.gaussian is not None
        for name in names:
            ours = moments[name].moments().gaussian("the decoded latents")
            fids[name] = frechet_distance(ours, reference.gaussian)
        warning = reference.warning(len(latents))
    return DecoderReport(
        results=tuple(
            DecoderResult(name, str(path), fids[name], float(np.concatenate(ratios[name]).mean()))
            for name, path in zip(names, paths, strict=True)
        ),
        num_images=len(latents),
        image_size=rae.image_size,
        reference=reference,
        grid=_grid(shown),
        warnings=(warning,) if warning else (),
    )


def _decoding(rae: RAE, runtime: Runtime) -> Callable[[Tensor], Tensor]:
    @runtime.compile
    def decode(latents: Tensor) -> Tensor:
        with torch.no_grad(), runtime.autocast():
            return to_pixels(rae.decode(latents)).permute(0, 3, 1, 2).contiguous()

    return decode


def _grid(shown: Mapping[str, list[Pixels]]) -> Pixels:
    pictures = [picture.transpose(1, 2, 0) for row in shown.values() for picture in row]
    columns = len(next(iter(shown.values())))
    return to_grid(np.stack(pictures), columns, captions=list(shown))
