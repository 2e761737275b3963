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


def write_captions(folder: Path) -> Path:
    """Write a tar of noise with captions, and its index."""
    out = folder / "captions"
    if not (out / "index.json").exists():
        import io
        import tarfile

        import numpy as np
        from PIL import Image

        from rae_xla.data.shards.captioned import index_captioned

        rng = np.random.default_rng(0)
        (folder / "tars").mkdir(exist_ok=True)
        with tarfile.open(folder / "tars/0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(IMAGES):
                image = io.BytesIO()
                noise = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
                Image.fromarray(noise).save(image, "png")
                caption = f"noise number {i}".encode()
                for extension, content in (("png", image.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{i:03d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        index_captioned(str(folder / "tars"), str(out))
    return out


def prompt_reading_settings(folder: Path) -> list[str]:
    """Return settings for a tiny model of random weights that reads the tokens of prompts."""
    golden = ROOT / "tests/golden"
    decoder = golden / "t2i/decoder/siglip2_decoder_grid4"
    language_model = {
        "model_type": "qwen3", "vocab_size": 297, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "tie_word_embeddings": True,
    }  # fmt: skip
    head = {
        "hidden_size": 32, "depth": 2, "num_heads": 2, "wide_hidden_size": 48, "wide_depth": 1,
        "wide_num_heads": 2, "base_model_depth": 1,
    }  # fmt: skip
    return [
        f"stage_1.params.encoder_config_path={golden}/raev2/encoders/dinov3",
        "stage_1.params.encoder_params.layers=[1,3,5]",
        "stage_1.params.encoder_input_size=64",
        f"stage_1.params.decoder_config_path={decoder}",
        "stage_1.params.decoder_patch_size=14",
        f"stage_1.params.pretrained_decoder_path={decoder}/model.pt",
        "stage_1.params.normalization_stat_path=null",
        f"text_to_image.language_model_config={language_model}",
        "text_to_image.language_model=null",
        f"text_to_image.tokenizer={golden}/t2i/tokenization/tokenizer",
        "text_to_image.length=32",
        f"text_to_image.head={head}",
        "sampler.params.num_steps=3",
        "misc.latent_size=[32,4,4]",
        f"data.train={write_captions(folder)}",
        *RUN,
        "data.image_size=56",
    ]


def text_to_image_settings(folder: Path) -> list[str]:
    """Return settings for a tiny text-to-image model of random weights."""
    golden = ROOT / "tests/golden/t2i"
    encoder, decoder = golden / "encoder/siglip2/hf", golden / "decoder/siglip2_decoder_grid4"
    language_model = {
        "model_type": "qwen2", "vocab_size": 297, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return [
        f"stage_1.params.encoder_config_path={encoder}",
        f"stage_1.params.encoder_params.model_name={encoder}",
        "stage_1.params.encoder_input_size=56",
        f"stage_1.params.decoder_config_path={decoder}",
        f"stage_1.params.pretrained_decoder_path={decoder}/model.pt",
        f"text_to_image.language_model_config={language_model}",
        "text_to_image.language_model=null",
        f"text_to_image.tokenizer={golden}/tokenization/tokenizer",
        "text_to_image.length=128",
        "text_to_image.head={condition_dim: 24, hidden_size: 32, depth: 1, num_heads: 2}",
        "misc.latent_size=[32,4,4]",
        f"data.train={write_captions(folder)}",
        *RUN,
        "data.image_size=56",
        "text_to_image.language_model_scheduler.warmup_steps=1",
        "text_to_image.language_model_scheduler.decay_end_steps=2",
    ]


def with_base(path: Path) -> dict[str, dict[str, dict[str, object]]]:
    """Return the sections of a configuration that it has itself or that its bases have."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "base" not in config:
        return config
    inherited = with_base(path.parent / config.pop("base"))
    for name, section in config.items():
        params = {**inherited.get(name, {}).get("params", {}), **section.pop("params", {})}
        inherited[name] = {**inherited.get(name, {}), **section, "params": params}
    return inherited


def encoder_settings(name: str) -> tuple[Path, list[str]]:
    """Return the golden case of an encoder's decoder, and the settings of the encoder."""
    if name == "DINOv3Encoder":  # its tokens have the shape of the other's
        return ROOT / "tests/golden/rae/dinov2", [
            f"stage_1.params.encoder_config_path={ROOT}/tests/golden/raev2/encoders/dinov3",
            "stage_1.params.encoder_params.layers=[1,3,5]",
            "stage_1.params.encoder_input_size=64",
        ]
    case, parameter, pixels = ENCODERS[name]
    encoder = ROOT / "tests/golden/rae" / case
    return encoder, [
        f"stage_1.params.encoder_config_path={encoder}/encoder",
        f"stage_1.params.encoder_params.{parameter}={encoder}/encoder",
        f"stage_1.params.encoder_input_size={pixels}",
    ]


def main() -> None:
    """Write the files that are missing and print the settings."""
    config = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    if "text_to_image" in config:
        reads_prompts = config["text_to_image"].get("read") == "tokens"
        settings_of = prompt_reading_settings if reads_prompts else text_to_image_settings
        print("\n".join(settings_of(folder)))
        return
    config = with_base(Path(sys.argv[1]))
    encoder, settings = encoder_settings(config["stage_1"]["params"]["encoder_cls"])
    shards = write_data(folder)
    settings += [
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
        if "base_model_depth" in config["stage_2"]["params"]:
            settings.append("stage_2.params.base_model_depth=1")
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
