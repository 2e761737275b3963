"""Published text-to-image models: Scale-RAE (2601.16208), hub collection nyu-visionx/scale-rae."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rae_xla.errors import UserError
from rae_xla.models.pretrained.hub import pull

MODEL_FILES = ("*.json", "*.safetensors", "*.txt")
"""Patterns of the files of a model: configuration, weights and tokenizer."""
DECODER_FILES = ("config.json", "model.pt")
ENCODER_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


@dataclass(frozen=True)
class PublishedTextToImage:
    """A published text-to-image model.

    Attributes:
        about: one line for ``rae-xla hub list``.
        repository: hub id of the model with its tokenizer.
        decoder: hub id of the decoder.
        encoder_cls: published name of the encoder class.
        encoder: hub id of the encoder.
    """

    about: str
    repository: str
    decoder: str
    encoder_cls: str
    encoder: str

    def files(self) -> dict[str, list[str]]:
        """Return the files that it needs: repository -> paths or patterns."""
        return {
            self.repository: list(MODEL_FILES),
            self.decoder: list(DECODER_FILES),
            self.encoder: list(ENCODER_FILES),
        }

    def stage_1(self) -> dict[str, Any]:
        """Return the ``stage_1`` section of a configuration, with hub ids for files."""
        return {
            "target": "stage1.RAE",
            "params": {
                "encoder_cls": self.encoder_cls,
                "encoder_config_path": self.encoder,
                "encoder_input_size": 224,
                "encoder_params": {"model_name": self.encoder},
                "decoder_config_path": self.decoder,
                "decoder_patch_size": 14,
                "pretrained_decoder_path": f"{self.decoder}/model.pt",
                "noise_tau": 0.0,
            },
        }


_SIGLIP2 = ("nyu-visionx/siglip2_decoder", "SigLIP2wNorm", "google/siglip2-so400m-patch14-224")
_WEBSSL = (
    "nyu-visionx/webssl300m_decoder",
    "WebSSLEncoder",
    "facebook/webssl-dino300m-full2b-224",
)

TEXT_TO_IMAGE: dict[str, PublishedTextToImage] = {
    "scale-rae-qwen1.5b": PublishedTextToImage(
        "text-to-image: Qwen2.5-1.5B, 2.4 B head, SigLIP2 latents",
        "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B",
        *_SIGLIP2,
    ),
    "scale-rae-qwen1.5b-webssl": PublishedTextToImage(
        "text-to-image: Qwen2.5-1.5B, 2.4 B head, WebSSL-DINO latents",
        "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B-WebSSL",
        *_WEBSSL,
    ),
    "scale-rae-qwen7b": PublishedTextToImage(
        "text-to-image: Qwen2.5-7B, 9.8 B head, SigLIP2 latents",
        "nyu-visionx/Scale-RAE-Qwen7B_DiT9.8B",
        *_SIGLIP2,
    ),
}


def fetch_text_to_image(name: str) -> dict[str, Path]:
    """Download the files of a published text-to-image model.

    Args:
        name: key of ``TEXT_TO_IMAGE``.

    Returns:
        Repository -> folder of its files.

    Raises:
        UserError: something cannot be downloaded; names everything that is needed.
    """
    files = TEXT_TO_IMAGE[name].files()
    folders: dict[str, Path] = {}
    for repository, patterns in files.items():
        try:
            folders[repository] = pull(repository, patterns).folder
        except UserError as error:
            needed = "; ".join(f"{owner}: {', '.join(names)}" for owner, names in files.items())
            raise UserError(
                f"{name} needs files of {len(files)} repositories ({needed}), which `rae-xla hub "
                f"pull {name}` downloads to the cache: {error}"
            ) from error
    return folders
