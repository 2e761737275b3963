"""Published models of RAEv2 (arXiv 2605.18324): files, and constructor arguments.

Hub repository ``nyu-visionx/RAEv2-models``; ``configs/sampling`` and ``configs/stage1/pretrained``
hold the same in YAML, and a test compares the two. The encoder is downloaded from its own
repository, whose licence must be accepted on the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rae_xla.models.pretrained.raev2_files import REPOSITORY, published_layers

LOCAL = "models/"
_DINOV3_L = "facebook/dinov3-vitl16-pretrain-lvd1689m"
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class RAEv2Autoencoder:
    """A published RAE on DINOv3-L, whose decoder predicts pixels.

    Attributes:
        folder: of the decoder and the statistics in the repository.
        decoder_config: the decoder's keys of its config.json.
    """

    folder: str
    decoder_config: dict[str, Any]
    repository: str = REPOSITORY
    encoder: str = _DINOV3_L
    grid: int = 16

    @property
    def decoder(self) -> str:
        """Path of the decoder's weights in the repository."""
        return f"{self.folder}/decoder.pt"

    @property
    def statistics(self) -> str:
        """Path of the latent statistics in the repository."""
        return f"{self.folder}/stats.pt"

    def arguments(self) -> dict[str, Any]:
        """Return the constructor arguments of the RAE."""
        layers = published_layers(self.decoder)
        fusion = {"layers": layers, "token_mean": True} if layers else {}
        return {
            "encoder_cls": "DINOv3Encoder",
            "encoder_config_path": self.encoder,
            "encoder_input_size": 16 * self.grid,
            "encoder_params": fusion,
            "decoder_config_path": self.decoder_config,
            "pretrained_decoder_path": LOCAL + self.decoder,
            "noise_tau": 0.0,
            "reshape_to_2d": True,
            "normalization_stat_path": LOCAL + self.statistics,
            "decoder_output": "pixels",
            **_IMAGENET,
        }

    def section(self) -> dict[str, Any]:
        """Return the ``stage_1`` section of a configuration."""
        return {"target": "stage1.RAE", "params": self.arguments()}


@dataclass(frozen=True)
class RAEv2Denoiser:
    """The published DiT-DH with in-context conditioning and a base head.

    Attributes:
        file: path of its weights in the repository.
    """

    file: str = "stage2/imagenet/dinov3l-k7/checkpoint.pt"
    repository: str = REPOSITORY

    def section(self, grid: int) -> dict[str, Any]:
        """Return the ``stage_2`` section of a configuration for latents of ``grid`` x ``grid``."""
        params = {
            "input_size": grid,
            "patch_size": 1,
            "in_channels": 1024,
            "hidden_size": [1440, 2048],
            "depth": [28, 2],
            "num_heads": [20, 16],
            "mlp_ratio": 4.0,
            "class_dropout_prob": 0.1,
            "num_classes": 1000,
            "conditioning": "tokens",
            "num_t_tokens": 4,
            "num_c_tokens": 8,
            "base_model_depth": 8,
            "use_qknorm": True,
            "use_pos_embed": False,
        }
        return {"target": "DiTDH", "params": params, "ckpt": LOCAL + self.file}


@dataclass(frozen=True)
class RAEv2Generator:
    """The published class-conditional generator (1,000 ImageNet classes), with internal guidance.

    Attributes:
        about: one line for ``rae-xla hub list``.
        autoencoder: name of its autoencoder.
        rae: its autoencoder.
        denoiser: its diffusion transformer.
    """

    about: str
    autoencoder: str
    rae: RAEv2Autoencoder
    denoiser: RAEv2Denoiser = RAEv2Denoiser()
    guide: None = None

    def stage_2(self) -> dict[str, Any]:
        """Return the ``stage_2`` section of its configuration."""
        return self.denoiser.section(self.rae.grid)

    def tree(self) -> dict[str, Any]:
        """Return its configuration as the content of a YAML file: the published sampling."""
        return {
            "stage_1": self.rae.section(),
            "stage_2": self.stage_2(),
            "transport": {
                "params": {
                    "prediction": "x",
                    "t_eps": 0.05,
                    "time_dist_type": "logit-normal_0_1",
                    "truncate_times": False,
                }
            },
            "sampler": {
                "mode": "ODE",
                "params": {"sampling_method": "euler", "num_steps": 100, "end": 0.0},
            },
            "guidance": {"method": "internal", "scale": 1.78, "t_min": 0.1, "t_max": 1.0},
            "misc": {"time_dist_shift_dim": 1024 * self.rae.grid**2, "time_dist_shift_base": 4096},
        }


def raev2_models(
    decoder_config: dict[str, Any],
) -> tuple[dict[str, RAEv2Autoencoder], dict[str, RAEv2Generator]]:
    """Return the autoencoders and the generator of RAEv2 by name.

    Args:
        decoder_config: keys of the ViT-XL decoder's config.json.
    """
    autoencoders = {
        f"raev2-dinov3l-k{count}{suffix}": RAEv2Autoencoder(
            f"stage1/{data}/dinov3l-k{count}", decoder_config
        )
        for data, suffix in (("imagenet", ""), ("general", "-general"))
        for count in (7, 23)
    }
    name = "raev2-dinov3l-k7"
    about = "RAEv2: DiT-DH-XL, 256 px, internal guidance"
    return autoencoders, {"raev2-ditdh-xl-256": RAEv2Generator(about, name, autoencoders[name])}
