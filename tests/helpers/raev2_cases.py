"""Models of the recorded RAEv2 cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from golden_case import Case, load_case
from torch import nn

from rae_xla.models.dit import LightningDiT
from rae_xla.models.dit_dh import DiTDH
from rae_xla.models.embeddings import TimestepEmbedder
from rae_xla.models.pretrained.dit_layouts import from_raev2

# What RAEv2's classes always have (raev2.md, section 2).
ALWAYS = {"conditioning": "tokens", "use_qknorm": True, "use_pos_embed": False}


def model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the recorded constructor arguments of RAEv2's classes to ours."""
    settings = dict(config) | ALWAYS
    settings |= settings.pop("cond_arch", {"num_t_tokens": 2, "num_c_tokens": 3})
    settings = {k: v for k, v in settings.items() if k not in ("condition_type", "n_action_tokens")}
    if not settings.pop("enable_repa", False):
        settings.pop("repa_layer_depth", None)
    return settings


def build(name: str) -> tuple[nn.Module, Case]:
    """Build the model of a case, in eval mode, with its recorded weights."""
    case = load_case(f"raev2/{name}")
    state_case = (
        load_case(f"raev2/{case.meta['state_from']}") if "state_from" in case.meta else case
    )
    lightning = "LightningDiT" in state_case.meta.get("target", "")
    model = (LightningDiT if lightning else DiTDH)(**model_settings(case.meta["config"]))
    if case.meta["config"].get("condition_type") == "nwm":
        width = model.s_embedder.proj.out_channels
        model.y_embedder = NavigationEmbedder(case.meta["config"], width)
    model.load_state_dict(from_raev2(state_case.under("state")))
    return model.eval(), case


def context(case: Case) -> Any:
    """Return the labels of a case, or what it is conditioned on in place of them."""
    if "in.y" in case.tensors:
        return case["in.y"]
    return tuple(case[f"in.{name}"] for name in ("context_latents", "action", "rel_time"))


def outputs(model: nn.Module, case: Case) -> dict[str, torch.Tensor]:
    """Return the outputs of a model for the inputs of a case, by their recorded names."""
    found = model(case["in.x"], case["in.t"], context(case), all_outputs=True)
    return {name: value for name, value in found._asdict().items() if value is not None}


class NavigationEmbedder(nn.Module):
    """Context tokens of RAEv2's world model: earlier frames, an action and the time between them.

    Not part of the package: it shows that the transformer attends to any context that is embedded
    in place of labels (raev2.md, section 2, item 3).
    """

    def __init__(self, config: Mapping[str, Any], width: int) -> None:
        super().__init__()
        [patch, _], channels = config["patch_size"], config["in_channels"]
        self.context_patch_embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.action_tokens = nn.Parameter(torch.empty(4, width))
        self.action_proj = nn.Linear(3, width)
        self.time_emb = TimestepEmbedder(width, num_tokens=1)

    def tokens(
        self, y: tuple[torch.Tensor, torch.Tensor, torch.Tensor], label_drop: None
    ) -> torch.Tensor:
        """Return tokens (B, K * L + 5, D) of frames (B, K, C, H, W), an action and a time."""
        frames, action, time = y
        patches = self.context_patch_embed(frames.flatten(0, 1)).flatten(2).transpose(1, 2)
        patches = patches.reshape(len(frames), -1, patches.shape[-1])
        actions = self.action_tokens + self.action_proj(action)[:, None]
        times = self.time_emb.tokens(self.time_emb(time[:, 0]))
        return torch.cat([patches, actions, times], dim=1)
