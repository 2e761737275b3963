"""A tiny text-to-image model with random weights, in the folder layout of Scale-RAE."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from golden_case import GOLDEN
from tiny_captions import LANGUAGE_MODEL, TOKENIZER

from rae_xla.models.rae import RAE
from rae_xla.models.text_to_image.language_model import LanguageModel, read_lm_config
from rae_xla.models.text_to_image.model import TextToImageModel
from rae_xla.models.text_to_image.scale_rae import save_scale_rae
from rae_xla.models.text_to_image.settings import HeadSettings

FAST = ["--num-steps", "2", "runtime.backend=torch"]


def write_tiny_text_to_image(folder: Path) -> Path:
    """Write ``folder/model`` with tokenizer and autoencoder, and return it.

    Latents are 32 x 4 x 4, images 56 pixels a side. No weight is zero, so that prompt and guidance
    change every pixel.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = HeadSettings(
            tokens=16, channels=32, condition_dim=24, hidden_size=32, depth=1, num_heads=2
        )
        model = TextToImageModel(LanguageModel(read_lm_config(LANGUAGE_MODEL)), settings)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not bool(parameter.any()) and name != "head.pos_embed":
                    parameter.normal_(std=0.3)
    out = folder / "model"
    save_scale_rae(model, out)
    shutil.copy(Path(TOKENIZER) / "tokenizer.json", out)
    tiny_autoencoder().save_pretrained(out / "rae")
    return out


def tiny_autoencoder() -> RAE:
    """Return the autoencoder of the golden cases, with SigLIP2."""
    encoder, decoder = (
        GOLDEN / "t2i/encoder/siglip2/hf",
        GOLDEN / "t2i/decoder/siglip2_decoder_grid4",
    )
    return RAE(
        encoder_cls="SigLIP2wNorm",
        encoder_config_path=str(encoder),
        encoder_input_size=56,
        encoder_params={"model_name": str(encoder)},
        decoder_config_path=decoder,
        decoder_patch_size=14,
        pretrained_decoder_path=str(decoder / "model.pt"),
        noise_tau=0.0,
    ).eval()
