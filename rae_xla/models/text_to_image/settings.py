"""Settings of a text-to-image model: how the prompt is read, and how it conditions the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from rae_xla.errors import UserError
from rae_xla.models.text_to_image.cross_attention import CrossAttentionDiT
from rae_xla.models.text_to_image.head import PerTokenDiT
from rae_xla.models.text_to_image.in_context import InContextDiT

INJECTIONS = ("per-token", "in-context", "cross-attention")
"""How conditions reach the head: each modulates one latent token, or all are attended to."""


@dataclass(frozen=True)
class PromptReading:
    """How the hidden states of the tokens of a prompt are read.

    Attributes:
        length: tokens of a prompt, padding included.
        dropped: first tokens that are not read, such as those of a template.
        layers: of the language model: 0 is the embeddings, i the output of layer i, -1 the final
            states.
        average: whether the states of the layers are averaged; otherwise stacked as channels.
    """

    length: int = 256
    dropped: int = 0
    layers: tuple[int, ...] = (-1,)
    average: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that are read."""
        return self.length - self.dropped

    def channels(self, width: int) -> int:
        """Return the channels of a condition vector for states of ``width`` channels."""
        return width if self.average else width * len(self.layers)


@dataclass(frozen=True)
class WideHead:
    """The shallow, wide part of an in-context head, which is a DiT-DH.

    Attributes:
        hidden_size: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads per block.
        num_time_tokens: time tokens that the other part of the head attends to.
    """

    hidden_size: int = 2048
    depth: int = 2
    num_heads: int = 16
    num_time_tokens: int = 4


@dataclass(frozen=True)
class HeadSettings:
    """Sizes of the image part; the defaults are those of the published 2.4 B head for SigLIP2.

    Attributes:
        tokens: latent tokens of an image, a square number; also the number of queries.
        channels: of a latent token.
        condition_dim: channels of a condition vector; 0: those of the language model, without
            projector. Only for queries.
        hidden_size: width of the head.
        depth: blocks of the head.
        num_heads: attention heads of the head.
        condition_dropout_prob: probability of the null condition in training.
        statistics: shape of latent statistics that the model contains, (C,) or (P, C); None: none.
        auxiliary: whether the model has the auxiliary regression head.
        inject: one of ``INJECTIONS``.
        prompt: how the tokens of the prompt are read; None: queries are read.
        wide: the wide part of an in-context head.
        base_model_depth: block of the head, from 1, that the base head reads; None: no base head.
    """

    tokens: int = 256
    channels: int = 1152
    condition_dim: int = 2048
    hidden_size: int = 2048
    depth: int = 32
    num_heads: int = 32
    condition_dropout_prob: float = 0.1
    statistics: tuple[int, ...] | None = None
    auxiliary: bool = False
    inject: str = "per-token"
    prompt: PromptReading | None = None
    wide: WideHead = WideHead()
    base_model_depth: int | None = None

    def __post_init__(self) -> None:
        if self.inject not in INJECTIONS:
            raise UserError(f"inject: {self.inject!r} is not one of {', '.join(INJECTIONS)}")
        if self.inject != "per-token":
            return
        if self.prompt is not None:
            raise UserError(
                "inject: per-token needs a condition for each latent token, which the tokens of a "
                "prompt are not: write read: queries, or inject: in-context or cross-attention"
            )
        if self.base_model_depth is not None:
            raise UserError(
                "base_model_depth: a per-token head has no base head: remove the key, or write "
                "inject: in-context or cross-attention"
            )

    @property
    def is_published(self) -> bool:
        """Whether Scale-RAE has models of this kind."""
        return self.inject == "per-token"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadSettings:
        """Return the settings that ``to_dict`` returned, also after JSON.

        Raises:
            UserError: the values are not settings of this version.
        """
        values = dict(values)
        try:
            if (prompt := values.get("prompt")) is not None:
                layers = tuple(prompt["layers"])
                values["prompt"] = PromptReading(**{**prompt, "layers": layers})
            values["wide"] = WideHead(**values.get("wide", {}))
            if values.get("statistics") is not None:
                values["statistics"] = tuple(values["statistics"])
            return cls(**values)
        except (TypeError, KeyError) as error:
            raise UserError(
                f"the settings of the text-to-image model cannot be read ({error}): they are from "
                "another version of rae_xla"
            ) from error


def build_head(settings: HeadSettings, width: int) -> nn.Module:
    """Build the head of a model.

    Args:
        settings: of the model.
        width: channels of the language model's hidden states.

    Raises:
        UserError: the sizes are incompatible.
    """
    sizes: dict[str, Any] = {
        "input_size": round(settings.tokens**0.5),
        "in_channels": settings.channels,
    }
    prompt = settings.prompt
    condition_dim = settings.condition_dim or width
    if prompt is not None:
        condition_dim = prompt.channels(width)
    if settings.inject == "per-token":
        return PerTokenDiT(
            **sizes,
            condition_dim=condition_dim,
            hidden_size=settings.hidden_size,
            depth=settings.depth,
            num_heads=settings.num_heads,
            condition_dropout_prob=settings.condition_dropout_prob,
        )
    sizes |= {"context_dim": condition_dim, "base_model_depth": settings.base_model_depth}
    if settings.inject == "cross-attention":
        return CrossAttentionDiT(
            **sizes,
            hidden_size=settings.hidden_size,
            depth=settings.depth,
            num_heads=settings.num_heads,
        )
    wide = settings.wide
    return InContextDiT(
        **sizes,
        context_tokens=settings.tokens if prompt is None else prompt.tokens,
        hidden_size=(settings.hidden_size, wide.hidden_size),
        depth=(settings.depth, wide.depth),
        num_heads=(settings.num_heads, wide.num_heads),
        num_t_tokens=wide.num_time_tokens,
    )
