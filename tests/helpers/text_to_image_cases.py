"""Build the text-to-image model of a golden case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from golden_case import Case, load_case
from torch import Tensor

from rae_xla.models.text_to_image.language_model import LanguageModel, read_lm_config
from rae_xla.models.text_to_image.model import TextToImageModel
from rae_xla.models.text_to_image.scale_rae import from_published
from rae_xla.models.text_to_image.settings import HeadSettings, PromptReading, WideHead
from rae_xla.models.text_to_image.slots import PADDING, ImageSlots
from rae_xla.transport.sized_flow import SizedFlow, size_shift

PROMPT_LENGTH = 6
FINAL_STATES = PromptReading(PROMPT_LENGTH)
_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
LANGUAGE_MODELS = {
    "qwen3": _SIZES | {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 8},
    "bert": _SIZES | {"model_type": "bert"},
}


@dataclass
class JointCase:
    """A golden case of the whole model, with its inputs in our form."""

    case: Case
    model: TextToImageModel
    flow: SizedFlow
    slots: ImageSlots
    features: Tensor  # (B, M, P, C)
    repeats: int

    def by_slot(self, name: str) -> Tensor:
        """Return a tensor of all images and times as (B, M, K, ...)."""
        batch, count = self.features.shape[:2]
        return self.case[name].unflatten(0, (batch, count, self.repeats))


def build_model(
    case: Case, *, tokens: int, channels: int, auxiliary: bool = False
) -> TextToImageModel:
    """Build the model of a case and load its recorded weights."""
    config = case.meta["config"]
    model = TextToImageModel(
        LanguageModel(read_lm_config({"model_type": "qwen2", **config["llm"]})),
        HeadSettings(
            tokens=tokens,
            channels=channels,
            condition_dim=config["diffusion_model_z_channels"],
            hidden_size=config["diffusion_model_hidden_size"],
            depth=config["diffusion_model_depth"],
            num_heads=config["diffusion_model_heads"],
            condition_dropout_prob=config["diffusion_class_dropout_prob"],
            auxiliary=auxiliary,
        ),
    )
    model.load_state_dict(from_published(case.under("state")))
    return model.eval()


def load_joint(name: str) -> JointCase:
    """Load a case of ``t2i/joint``."""
    case = load_case(f"t2i/joint/{name}")
    config, tokens = case.meta["config"], case.meta["tokens_per_image"]
    channels, count = config["diffusion_model_channels"], case.meta["max_images_per_sample"]
    model = build_model(case, tokens=tokens, channels=channels, auxiliary=config["aux_regression"])
    ids, labels = case["in.input_ids"], case["in.labels"]
    return JointCase(
        case,
        model,
        SizedFlow(size_shift(channels, tokens, config["diffusion_base_dim"])),
        model.slots(ids, labels, count),
        case["in.image_features"].unflatten(0, (len(ids), count)),
        config["diffusion_timesteps_per_sample"],
    )


def tiny_model(
    kind: str = "qwen3",
    inject: str = "in-context",
    prompt: PromptReading | None = FINAL_STATES,
    **changes: Any,
) -> TextToImageModel:
    """Return a tiny model in eval mode whose layers all have random weights."""
    torch.manual_seed(0)
    settings = {
        "tokens": 4,
        "channels": 3,
        "condition_dim": 5,
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "wide": WideHead(24, 1, 2, 2),
        "base_model_depth": 1,
    }
    head = HeadSettings(**settings | {"inject": inject, "prompt": prompt} | changes)
    model = TextToImageModel(LanguageModel(read_lm_config(LANGUAGE_MODELS[kind])), head)
    for parameter in model.head.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prompts() -> torch.Tensor:
    """Return the ids of prompts of 6, 3 and 0 tokens."""
    ids = torch.arange(3 * PROMPT_LENGTH).reshape(3, PROMPT_LENGTH)
    return torch.where(torch.arange(PROMPT_LENGTH) < torch.tensor([6, 3, 0])[:, None], ids, PADDING)
