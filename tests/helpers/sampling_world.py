"""A tiny autoencoder, diffusion transformer and guide with random weights, as files."""

from pathlib import Path

import numpy as np
import torch
import yaml
from rae_cases import rae_arguments

from rae_xla.config import load_config
from rae_xla.interop.instantiate import instantiate

CLASSES = 4
COUNT = 200


def make_world(folder: Path) -> Path:
    """Write weights and ``run.yaml``, and return the path of the latter.

    Images are 32x32 pixels, latents 4x4; the time grid has 5 points, and the guide has another
    architecture than the model.
    """
    autoencoder = rae_arguments("dinov2", noise_tau=0.0)
    shared = {"input_size": 4, "patch_size": 1, "in_channels": 32, "num_classes": CLASSES}
    model = {
        "target": "DiTDH",
        "params": shared | {"hidden_size": [16, 24], "depth": [1, 1], "num_heads": [2, 2]},
        "ckpt": str(folder / "model.pt"),
    }
    guide = {
        "target": "LightningDiT",
        "params": shared | {"hidden_size": 8, "depth": 1, "num_heads": 2},
        "ckpt": str(folder / "guide.pt"),
    }
    config = {
        "stage_1": {"target": "RAE", "params": autoencoder},
        "stage_2": model,
        "guidance": {"guidance_model": guide},
        "sampler": {"params": {"num_steps": 5}},
        "misc": {"time_dist_shift_base": 512 / 2.25},  # a shift of 1.5
        "runtime": {"backend": "torch"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    loaded = load_config(str(path))
    for number, spec in enumerate((loaded.stage_2, loaded.guidance.guidance_model)):
        with torch.no_grad():
            _write_weights(spec, seed=number)
    return path


def _write_weights(spec, seed: int) -> None:
    """Write random weights; the initial ones contain zeros that make all images equal."""
    network = instantiate({"target": spec.target, "params": dict(spec.params)})
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.1, generator=generator)
    torch.save(network.state_dict(), spec.ckpt)


def command(world, out, *more):
    """Return the arguments of ``rae-xla`` that sample COUNT images to the subfolder ``out``."""
    return (
        "sample", "--config", world["config"], "--out", world["folder"] / out, "--num-samples",
        COUNT, "--seed", 3, "guidance.scale=1.5", "guidance.t_max=0.7", *more,
    )  # fmt: skip


def sampled_images(world, out):
    """Return the images (COUNT, H, W, 3) uint8 that the command wrote."""
    with np.load(world["folder"] / out / "samples.npz") as arrays:
        assert arrays["labels"].tolist() == sorted(list(range(CLASSES)) * (COUNT // CLASSES))
        return arrays["arr_0"]
