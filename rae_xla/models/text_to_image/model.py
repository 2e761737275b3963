"""The text-to-image model: prompt, language model, conditions, diffusion head.

A model that reads queries is that of Scale-RAE (section 1 of its semantics): the learned queries
take the positions of an image to generate in the sequence; the language model's final hidden states
at these positions condition the diffusion head token by token. Context images enter the sequence as
projected encoder features. A model that reads tokens is that of RAEv2: the hidden states of the
prompt's tokens are a context that the head attends to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.layers import xavier_linear
from rae_xla.models.text_to_image.context import pack_context
from rae_xla.models.text_to_image.head import NullCondition, PerTokenDiT
from rae_xla.models.text_to_image.language_model import LanguageModel
from rae_xla.models.text_to_image.latents import (
    LatentStatistics,
    regression_loss,
    to_map,
    to_tokens,
)
from rae_xla.models.text_to_image.next_token import next_token_losses
from rae_xla.models.text_to_image.settings import HeadSettings, build_head
from rae_xla.models.text_to_image.slots import (
    PADDING,
    ImageSlots,
    answers_first,
    find_slots,
    positions_of,
    prompt_slots,
    select_rows,
    select_slots,
)
from rae_xla.ops.gather import gather_tokens


class TextToImageOutput(NamedTuple):
    """What a training step needs of a forward pass.

    Attributes:
        token_losses: (B,) sums of the cross-entropy over the supervised tokens of each row.
        token_matches: (B,) how many of them the model predicts.
        velocity: (R · A · K, C, side, side), the head's prediction for the noisy latents: the
            velocity, or what else the head is trained to predict.
        auxiliary: (R, A) regression losses; None without the auxiliary head.
        base: the prediction of the base head, like ``velocity``; None without one.
    """

    token_losses: Tensor
    token_matches: Tensor
    velocity: Tensor
    auxiliary: Tensor | None
    base: Tensor | None = None


class TextToImageModel(nn.Module):
    """A language model, a connector and a diffusion head, trained together or in parts.

    Args:
        language_model: run by transformers; causal if queries are read.
        settings: sizes of the image part.

    Attributes:
        settings: sizes of the image part.
        head: the diffusion model, called as ``head(x, t, condition)``.

    Raises:
        UserError: the sizes are incompatible.
    """

    def __init__(self, language_model: LanguageModel, settings: HeadSettings) -> None:
        super().__init__()
        self.settings = settings
        self.language_model = language_model
        self.null: NullCondition | None = None
        self.aux_vision_head: nn.Sequential | None = None
        width = language_model.hidden_size
        if settings.prompt is None:
            self._add_queries(width)
        else:
            language_model.mark_read_layers(settings.prompt.layers)
        self.head = build_head(settings, width)
        self.statistics = LatentStatistics(settings.statistics) if settings.statistics else None
        if settings.auxiliary:
            self.aux_vision_head = nn.Sequential(
                nn.Linear(width, width), nn.GELU(), nn.Linear(width, settings.channels)
            )
        if settings.prompt is None:
            self.init_connector()

    def _add_queries(self, width: int) -> None:
        """Add the queries and the projectors of a model that reads them."""
        settings = self.settings
        condition_dim = settings.condition_dim or width
        self.latent_queries = nn.Parameter(torch.empty(settings.tokens, width))
        self.mm_projector = nn.Sequential(
            nn.Linear(settings.channels, width), nn.GELU(), nn.Linear(width, width)
        )
        self.diff_head_projector = (
            nn.Linear(width, condition_dim) if settings.condition_dim else nn.Identity()
        )
        if settings.inject != "per-token" and settings.condition_dropout_prob > 0:
            self.null = NullCondition(condition_dim)

    @torch.no_grad()
    def init_connector(self) -> None:
        """Initialise the queries, the projectors and the auxiliary head."""
        width = self.latent_queries.shape[1]
        nn.init.normal_(self.latent_queries, std=width**-0.5)
        for module in (self.mm_projector, self.aux_vision_head):
            for layer in module or ():
                if isinstance(layer, nn.Linear):
                    xavier_linear(layer)
        if isinstance(self.diff_head_projector, nn.Linear):
            nn.init.normal_(self.diff_head_projector.weight, std=0.02)
            nn.init.zeros_(self.diff_head_projector.bias)

    @property
    def constants(self) -> frozenset[str]:
        """Names of the parameters that are never trained: tables of the head."""
        fixed = ("head.pos_embed", "head.t_embedder.W")
        in_context = self.settings.inject == "in-context"  # its frequencies are trained
        return frozenset(fixed[:1] if in_context else fixed)

    def describe(self) -> dict[str, Any]:
        """Return the settings and the configuration of the language model, as values for JSON."""
        return {
            "settings": self.settings.to_dict(),
            "language_model": self.language_model.config.to_dict(),
        }

    def slots(self, ids: Tensor, labels: Tensor, slots: int) -> ImageSlots:
        """Find the images of sequences; see ``slots.find_slots``.

        If tokens are read, every row is a prompt, and its only image is an answer.
        """
        if self.settings.prompt is None:
            return find_slots(ids, labels, slots, self.settings.tokens)
        return prompt_slots(ids, slots)

    def read_prompts(self, ids: Tensor) -> Tensor:
        """Return the contexts (B, T, channels + 1) of prompts; see ``context.pack_context``.

        Args:
            ids: (B, L) tokens, ``PADDING`` on the right.
        """
        prompt = self.settings.prompt
        assert prompt is not None, "this model reads queries"
        padding = ids == PADDING
        trained = any(p.requires_grad for p in self.language_model.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            ids = torch.where(padding, 0, ids)
            states = self.language_model.layer_states(ids, padding, prompt.layers)
            states = [part[:, prompt.dropped :] for part in states]
            read = torch.stack(states).mean(0) if prompt.average else torch.cat(states, -1)
        return pack_context(read, padding[:, prompt.dropped :])

    def conditions(self, states: Tensor, drop: Tensor | None = None) -> Tensor:
        """Return the conditions (N, P, ...) of the head from states read at queries.

        Args:
            states: (N, P, width).
            drop: (N,) bool, the conditions to replace by the learned null condition.
        """
        vectors = self.diff_head_projector(states)
        if self.settings.inject == "per-token":
            return vectors
        if drop is not None:
            if self.null is None:
                raise UserError("drop: the model has no null condition; use dropout probability 0")
            vectors = self.null(vectors, drop)
        return pack_context(vectors)

    def null_condition(self) -> Tensor | None:
        """Return the learned null condition, which broadcasts to conditions (B, P, ...).

        None for a model that reads tokens: its null condition is the context of an empty prompt.

        Raises:
            UserError: the model was trained without condition dropout.
        """
        if self.settings.prompt is not None:
            return None
        if isinstance(self.head, PerTokenDiT):
            return self.head.null_condition
        if self.null is None:
            raise UserError(
                "this model was trained without condition dropout and has no null condition: "
                "sample it with guidance scale 1"
            )
        vector = self.null.dropout_embedding
        return torch.cat([vector, vector.new_ones(1)])

    def embed(self, ids: Tensor, features: Tensor, slots: ImageSlots) -> Tensor:
        """Return the input embeddings of sequences, (B, L, width).

        The values of unused slots and of answers are selected away rather than multiplied by
        zero, so that neither their values nor NaN reach the result or a gradient.

        Args:
            ids: (B, L).
            features: encoder features of all slots, (B, M, P, C).
            slots: of the sequences.
        """
        tokens = self.settings.tokens
        text = self.language_model.embedding(torch.where(slots.is_image, 0, ids))
        context = slots.present & ~slots.answer
        features = torch.where(context[..., None, None], features, 0.0)
        projected = self.mm_projector(features).flatten(1, 2)
        images = gather_tokens(projected, slots.order)
        queries = self.latent_queries[slots.order % tokens]
        is_answer = slots.answer.gather(1, slots.order // tokens)[..., None]
        images = torch.where(is_answer, queries.to(images.dtype), images)
        return torch.where(slots.is_image[..., None], images.to(text.dtype), text)

    def read_queries(self, hidden: Tensor, slots: ImageSlots) -> Tensor:
        """Return the hidden states at the images of every slot, (B, M, P, width).

        They are the states at the positions themselves, not shifted by one as for text. A slot
        without image has zeros.
        """
        positions = positions_of(slots, self.settings.tokens)
        states = gather_tokens(hidden, positions.flatten(1)).unflatten(1, positions.shape[1:])
        return torch.where(slots.present[..., None, None], states, 0.0)

    def answer_latents(
        self, features: Tensor, slots: ImageSlots, count: int, row_pattern: tuple[int, int] = (1, 1)
    ) -> tuple[Tensor, Tensor]:
        """Return the diffusion data of the answers of each row, and which of them exist.

        Args:
            features: encoder features of all slots, (B, M, P, C).
            slots: of the sequences.
            count: A, answers of a row for which the head runs.
            row_pattern: see ``forward``.

        Returns:
            Data (R, A, C, side, side), zeros where there is no answer, and (R, A) bool.
        """
        features = select_rows(features, row_pattern)
        slot, exists = answers_first(select_rows(slots.answer, row_pattern), count)
        data = torch.where(exists[..., None, None], select_slots(features, slot), 0.0)
        if self.statistics is not None:
            data = self.statistics.normalize(data)
        side = round(self.settings.tokens**0.5)
        return data.transpose(-1, -2).unflatten(-1, (side, side)), exists

    def restore_latents(self, latents: Tensor) -> Tensor:
        """Undo the normalisation of generated latents (B, C, side, side) by statistics, if any."""
        if self.statistics is None:
            return latents
        return to_map(self.statistics.restore(to_tokens(latents)))

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        features: Tensor,
        slots: ImageSlots,
        noisy: Tensor,
        times: Tensor,
        drop: Tensor | None,
        row_pattern: tuple[int, int] = (1, 1),
    ) -> TextToImageOutput:
        """Compute the next-token losses of all rows and the velocities of the answer images.

        Args:
            ids: (B, L) int64.
            labels: (B, L) int64.
            features: encoder features of all slots, (B, M, P, C).
            slots: the images of the sequences.
            noisy: noisy latents of the first A answers of the R rows that ``row_pattern`` selects,
                (R, A, K, C, side, side): K times of each image.
            times: (R, A, K).
            drop: (R, A, K) bool, the conditions to replace by the null condition; None: none.
            row_pattern: (period, count): the head runs for the first ``count`` of every ``period``
                consecutive rows. The choice is static, so that other rows cost no pass.
        """
        if self.settings.prompt is not None:
            contexts = self.read_prompts(select_rows(ids, row_pattern))
            velocity, base = self._predict(noisy, times, contexts, None)
            none = torch.zeros_like(times[:, 0, 0])
            return TextToImageOutput(none, none, velocity, None, base)
        hidden = self.language_model(self.embed(ids, features, slots))
        token_losses, matches = next_token_losses(hidden, self.language_model.output_weight, labels)
        answers = noisy.shape[1]
        rows = ImageSlots(*(select_rows(part, row_pattern) for part in slots))
        states = self.read_queries(select_rows(hidden, row_pattern), rows)
        slot, exists = answers_first(rows.answer, answers)
        states = torch.where(exists[..., None, None], select_slots(states, slot), 0.0)
        velocity, base = self._predict(noisy, times, states.flatten(0, 1), drop)
        auxiliary = None
        if self.aux_vision_head is not None:
            target = select_slots(select_rows(features, row_pattern), slot)
            target = torch.where(exists[..., None, None], target, 0.0)
            auxiliary = regression_loss(self.aux_vision_head(states), target)
            auxiliary = torch.where(exists, auxiliary, 0.0)
        return TextToImageOutput(token_losses, matches, velocity, auxiliary, base)

    def _predict(
        self, noisy: Tensor, times: Tensor, states: Tensor, drop: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the predictions of the head and of its base head, if it has one.

        Args:
            noisy: (R, A, K, C, side, side).
            times: (R, A, K).
            states: (R · A, ...), contexts of prompts or states at queries.
            drop: (R, A, K) bool, see ``forward``.
        """
        x, t, repeats = noisy.flatten(0, 2), times.flatten(), noisy.shape[2]
        dropped = None if drop is None else drop.flatten()
        if self.settings.inject == "per-token":
            condition = self.conditions(states).repeat_interleave(repeats, dim=0)
            return self.head(x, t, condition, dropped), None
        if self.settings.prompt is None:
            condition = self.conditions(states.repeat_interleave(repeats, dim=0), dropped)
        else:
            condition = states.repeat_interleave(repeats, dim=0)
        if self.settings.base_model_depth is None:
            return self.head(x, t, condition), None
        outputs = self.head(x, t, condition, all_outputs=True)
        return outputs.full, outputs.base
