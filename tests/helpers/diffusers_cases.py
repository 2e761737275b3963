"""The recorded ``AutoencoderRAE`` folders of ``tests/golden/diffusers``."""

from __future__ import annotations

import json
from pathlib import Path

from golden_case import GOLDEN, Case, load_case
from safetensors.torch import save_file

CASES = ("dinov2", "dinov2_grid16", "mae")


def load_diffusers_case(name: str) -> Case:
    return load_case(f"diffusers/{name}/golden")


def write_diffusers_case(name: str, folder: Path) -> Case:
    """Write a recorded folder; as in diffusers, its configuration contains the statistics."""
    case = load_diffusers_case(name)
    folder.mkdir(parents=True, exist_ok=True)
    values = json.loads((GOLDEN / "diffusers" / name / "config.json").read_text())
    state = {key: tensor.clone() for key, tensor in case.under("state").items()}
    if case.meta["stats_shape"] is not None:
        values["latents_mean"] = state["_latents_mean"].tolist()
        values["latents_std"] = state["_latents_std"].tolist()
    (folder / "config.json").write_text(json.dumps(values))
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return case
