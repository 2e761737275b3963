"""Tiny stand-ins for ImageNet, published weights and a pod, for SMOKE=1.

    python scripts/examples/smoke.py CONFIG FOLDER

writes shards of coloured noise and random networks to FOLDER, and prints settings, one per line,
that reduce CONFIG until a CPU runs it in seconds. Encoders and decoders are those of tests/golden.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts/quickstart"))

CLASSES, IMAGES, SIZE = 4, 24, 32
DINO = {"depth": 2, "embed_dim": 32, "num_heads": 4, "patch_size": 32}
# Of tests/golden/rae: name, parameter that holds the folder of the encoder, input size in pixels.
ENCODERS = {
    "Dinov2withNorm": ("dinov2", "dinov2_path", 56),
    "SigLIP2wNorm": ("siglip2", "model_name", 32),
    "MAEwNorm": ("mae", "model_name", 32),
}
RUN = [
    "data.image_size=32", "training.steps=2", "training.global_batch_size=4",
    "training.grad_accum_steps=1",
    "training.log_every=1", "training.sample_every=0", "training.num_samples=4",
    "training.scheduler.base_lr=1.0e-3", "training.scheduler.warmup_steps=1",
    "training.scheduler.decay_end_steps=2", "checkpoint.every_steps=2", "data.num_workers=0",
    "runtime.backend=torch", "runtime.compile=false",
    "runtime.precision=fp32",
]  # fmt: skip
MODEL = [
    "stage_2.params.input_size=4", "stage_2.params.in_channels=32", "stage_2.params.depth=[1,1]",
    "stage_2.params.hidden_size=[32,48]", "stage_2.params.num_heads=[4,4]",
    f"stage_2.params.num_classes={CLASSES}", "sampler.params.num_steps=3",
    f"misc.num_classes={CLASSES}", "misc.latent_size=[32,4,4]", "misc.time_dist_shift_dim=512",
    "misc.time_dist_shift_base=128",
]  # fmt: skip


def write_data(folder: Path) -> Path:
    """Write shards of noise, and ``images.npz`` with the same images as a reference of the FID."""
    out = folder / "shards"
    if not (out / "index.json").exists():
        import numpy as np  # imported only if data is missing, to save time

        from rae_xla.data.shards.sources import array_source
        from rae_xla.data.shards.writer import write_shards

        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
        write_shards(array_source(images, np.arange(IMAGES) % CLASSES), str(out))
        np.savez(folder / "images.npz", arr_0=images)
    return out


def write_networks(folder: Path) -> None:
    """Write a random VGG16 and a random backbone of the discriminator (see scripts/quickstart)."""
    if not (folder / "dino.pth").exists():
        from random_loss_networks import write_dino, write_vgg16

        write_vgg16(folder / "vgg16.pth")
        write_dino(folder / "dino.pth", DINO)


def write_diffusion_model(folder: Path, config: str, settings: list[str]) -> Path:
    """Write random weights of the configured model, for scripts that only sample."""
    path = folder / "ditdh.pt"
    if not path.exists():
        import torch

        import rae_xla

        model = rae_xla.load_config(config, overrides=settings).stage_2
        target = {"target": model.target, "params": model.params}
        torch.save(rae_xla.instantiate(target).state_dict(), path)
    return path


def main() -> None:
    """Write the files that are missing and print the settings."""
    config = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    autoencoder = config.get("stage_1", {}).get(
        "params", {}
    )  # empty if the file inherits it from its base
    name, parameter, pixels = ENCODERS[autoencoder.get("encoder_cls", "Dinov2withNorm")]
    encoder = ROOT / "tests/golden/rae" / name
    shards = write_data(folder)
    settings = [
        f"stage_1.params.encoder_config_path={encoder}/encoder",
        f"stage_1.params.encoder_params.{parameter}={encoder}/encoder",
        f"stage_1.params.encoder_input_size={pixels}",
        f"stage_1.params.decoder_config_path={encoder}/decoder_config",
        "stage_1.params.decoder_patch_size=8",
        f"data.train={shards}",
        f"data.val={shards}",
        *RUN,
    ]
    if "stage_2" in config:
        settings += [
            f"stage_1.params.pretrained_decoder_path={encoder}/decoder.pt",
            f"stage_1.params.normalization_stat_path={encoder}/stat.pt",
            *MODEL,
        ]
        if "ckpt" in config["stage_2"]:
            model = write_diffusion_model(folder, sys.argv[1], settings)
            settings.append(f"stage_2.ckpt={model}")
    else:
        write_networks(folder)
        recipe = ", ".join(f"{key}: {value}" for key, value in DINO.items())
        settings += [
            f"weights.vgg16={folder}/vgg16.pth",
            f"gan.disc.arch.dino_ckpt_path={folder}/dino.pth",
            f"gan.disc.arch.recipe={{{recipe}}}",
            "gan.disc.arch.key_depths=[0]",
            "gan.disc.arch.ks=3",
            "gan.disc.scheduler.base_lr=1.0e-3",
            "gan.loss.disc_upd_start=0",
            "gan.loss.disc_start=0",
        ]
    print("\n".join(settings))


if __name__ == "__main__":
    main()
