"""Data and a configuration for benchmarks: random images and a random encoder of real shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Scale:
    """Sizes of a benchmark."""

    image: int
    encoder_input: int
    patch: int
    encoder: dict[str, int]
    decoder: dict[str, int]
    decoder_patch: int
    model: dict[str, Any]
    batch: int


SCALES = {
    # the sizes of the quickstart, for a laptop
    "digits": Scale(
        image=32,
        encoder_input=32,
        patch=8,
        encoder={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        decoder={"hidden_size": 128, "layers": 3, "heads": 4},
        decoder_patch=8,
        model={"hidden_size": [96, 192], "depth": [4, 2], "num_heads": [4, 4]},
        batch=64,
    ),
    # the published DiT-DH-S on DINOv2-B latents, for one GPU
    "S": Scale(
        image=256,
        encoder_input=224,
        patch=14,
        encoder={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        decoder={"hidden_size": 1152, "layers": 28, "heads": 16},
        decoder_patch=16,
        model={"hidden_size": [384, 2048], "depth": [12, 2], "num_heads": [6, 16]},
        batch=64,
    ),
}
BACKENDS = {
    "torch": ["runtime.backend=torch"],
    "xla, 1 device": ["runtime.backend=xla", "runtime.devices=1"],
    "xla, 4 devices": ["runtime.backend=xla", "runtime.devices=4", "mesh.ici.fsdp=4"],
}


def make_world(folder: Path, scale: Scale, images: int) -> Path:
    """Write shards, an encoder, a decoder configuration and ``run.yaml``; return the last."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    from rae_xla.data.shards.sources import array_source
    from rae_xla.data.shards.writer import write_shards

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, scale.image, scale.image, 3), dtype=np.uint8)
    write_shards(array_source(pixels, np.arange(images) % 10), str(folder / "shards"))
    encoder = Dinov2WithRegistersConfig(
        **scale.encoder, image_size=scale.encoder_input, patch_size=scale.patch
    )
    Dinov2WithRegistersModel(encoder).save_pretrained(folder / "encoder")
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "encoder/preprocessor_config.json").write_text(json.dumps(statistics))
    width = scale.decoder["hidden_size"]
    decoder = {
        "model_type": "vit_mae",
        "decoder_hidden_size": width,
        "decoder_intermediate_size": 4 * width if width < 1152 else 4096,
        "decoder_num_attention_heads": scale.decoder["heads"],
        "decoder_num_hidden_layers": scale.decoder["layers"],
    }
    (folder / "decoder.json").write_text(json.dumps(decoder))
    grid = scale.encoder_input // scale.patch
    config = {
        "stage_1": {
            "target": "RAE",
            "params": {
                "encoder_cls": "Dinov2withNorm",
                "encoder_config_path": str(folder / "encoder"),
                "encoder_input_size": scale.encoder_input,
                "decoder_config_path": str(folder / "decoder.json"),
                "decoder_patch_size": scale.decoder_patch,
                "noise_tau": 0.0,
            },
        },
        "stage_2": {
            "target": "DiTDH",
            "params": scale.model
            | {
                "input_size": grid,
                "in_channels": scale.encoder["hidden_size"],
                "num_classes": 10,
            },
        },
        "misc": {"time_dist_shift_base": scale.encoder["hidden_size"] * grid * grid},
        "training": {"global_batch_size": scale.batch, "sample_every": 0},
        "data": {"train": str(folder / "shards")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def rae_xla(*arguments: object) -> None:
    """Run the command line in a process of its own; its output is shown only if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "rae_xla", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    if done.returncode:
        sys.exit(f"rae-xla {' '.join(map(str, arguments))}\n{done.stderr}")
