"""The losses of a text-to-image model on token rows and images, for training and validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rae_xla.config.text_to_image import TextToImageConfig
from rae_xla.models.rae import RAE
from rae_xla.models.text_to_image.latents import to_tokens
from rae_xla.models.text_to_image.model import TextToImageModel
from rae_xla.models.text_to_image.next_token import supervised_tokens
from rae_xla.ops.random import CounterRNG
from rae_xla.runtime import Batch
from rae_xla.sample.images import to_unit
from rae_xla.train.text_to_image_validation import TIMES
from rae_xla.transport.paths import expand_like
from rae_xla.transport.sized_flow import SizedFlow
from rae_xla.transport.times import shift_time


@dataclass(frozen=True)
class TextToImageLosses:
    """What the losses of a batch depend on, besides the model.

    Attributes:
        settings: of the model and its rows.
        rae: frozen; its encoder gives the latents.
        flow: of the latents.
        seed: of the noise of validation.
    """

    settings: TextToImageConfig
    rae: RAE
    flow: SizedFlow
    seed: int

    def validation_sums(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sums of the validation losses of a batch; see ``ValidationLoss``."""
        rows, weight = batch["row"], batch["weight"]
        draws = CounterRNG(self.seed, rows[0] * 0, rows)
        times = shift_time(
            torch.tensor(TIMES, device=weight.device), self.flow.time_dist_shift
        ).expand(len(rows), self.settings.answers_per_row, -1)
        model = cast("TextToImageModel", model)
        text, matches, image = self.at(model, batch, draws, times, None, (1, 1))
        image = (image.sum(1) * weight[:, None]).sum(0)
        labels = batch["labels"].long()
        slots = model.slots(batch["ids"].long(), labels, self.settings.images_per_row)
        answers = slots.answer.float().sum(1).clamp(max=self.settings.answers_per_row)
        others = torch.stack([answers, text, matches, supervised_tokens(labels)])
        return torch.cat([image, (others * weight).sum(1)])

    def at(
        self,
        model: TextToImageModel,
        batch: Batch,
        draws: CounterRNG,
        t: Tensor,
        drop: Tensor | None,
        pattern: tuple[int, int],
        base_weight: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return text losses and matches (B,), and image losses (R, A, K), at times (R, A, K).

        The image losses are those of the head, plus ``base_weight`` times those of a base head.
        """
        ids, labels = batch["ids"].long(), batch["labels"].long()
        settings = self.settings
        slots = model.slots(ids, labels, settings.images_per_row)
        images = batch["image"]
        if settings.images_per_row > 1:
            images = images.flatten(0, 1)
        features = to_tokens(self.rae.encode(to_unit(images)).float())
        features = features.unflatten(0, (-1, settings.images_per_row))
        data, exists = model.answer_latents(features, slots, settings.answers_per_row, pattern)
        data = data[:, :, None].expand(-1, -1, t.shape[2], -1, -1, -1)
        noise = draws.normal("noise", data.shape[1:])
        out = model(
            ids,
            labels,
            features,
            slots,
            self.flow.path.interpolate(data, noise, expand_like(t, data)),
            t,
            drop,
            pattern,
        )
        latents = (data.flatten(0, 2), noise.flatten(0, 2), t.flatten())
        image = self.flow.output_loss(out.velocity.float(), *latents)
        if out.base is not None:
            base = self.flow.output_loss(out.base.float(), *latents)
            image = image + base_weight * base
        image = image.reshape(t.shape)
        return out.token_losses, out.token_matches, torch.where(exists[..., None], image, 0.0)
