"""Prompt sampler: from the tokens of prompts to conditions, latents and images."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rae_xla.data.conversations import ConversationTokenizer
from rae_xla.data.prompts import PromptTokenizer
from rae_xla.errors import UserError
from rae_xla.models.rae import RAE
from rae_xla.models.text_to_image.generation import StopTokens, generate
from rae_xla.models.text_to_image.model import TextToImageModel
from rae_xla.ops.eager_random import runs_eagerly
from rae_xla.ops.random import CounterRNG
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.denoiser import Denoiser, Progress
from rae_xla.sample.prompt_reader import PromptReader
from rae_xla.sample.prompts import noise_key
from rae_xla.sample.row_sampler import RowSampler
from rae_xla.transport.sized_flow import SizedFlow

if TYPE_CHECKING:
    from rae_xla.config import RunConfig

TEXT_BATCH = 16
"""Prompts that an accelerator answers together."""

_DRAW_STRIDE = 0x9E3779B1 - (1 << 32)  # an odd constant: 2^32 different keys for the draws


@dataclass(frozen=True)
class RequestFormat:
    """How a prompt becomes a request.

    Attributes:
        request: with ``{caption}`` in the place of the prompt.
        answer: text of the answer before the image.
        write_text: whether the model writes its answer itself, greedily, until it starts an image;
            otherwise the image follows ``answer`` at once.
        max_new_tokens: largest number of tokens that it writes.
    """

    request: str = "{caption}"
    answer: str = ""
    write_text: bool = False
    max_new_tokens: int = 256


class PromptSampler(RowSampler):
    """Generates images with a text-to-image model in the latent space of an RAE.

    Image i of a prompt is a function of the seed, the prompt and i. On CPUs images do not depend on
    the batch, because the number of rows per device is constant there, and prompts are read one by
    one.

    Args:
        config: sampler and guidance settings.
        backend: where the modules are placed.
        model: placed.
        rae: the autoencoder, placed; it decodes latents.
        flow: of the latents.
        tokenizer: of the language model.
        form: how a prompt becomes a request.
    """

    def __init__(
        self,
        config: RunConfig,
        backend: Backend,
        model: TextToImageModel,
        rae: RAE,
        flow: SizedFlow,
        tokenizer: ConversationTokenizer | PromptTokenizer,
        form: RequestFormat = RequestFormat(),
    ) -> None:
        super().__init__(backend, rae)
        self.model, self.tokenizer, self.form = model, tokenizer, form
        self._flow = flow
        self._reader = PromptReader(model, backend, tokenizer)
        self._noise_functions: dict[int, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
        self._set_denoiser(config)

    @property
    def autoencoder(self) -> RAE:
        """The autoencoder of the latents."""
        return self._rae

    def configured(self, config: RunConfig) -> PromptSampler:
        """Return a sampler of the same models with other sampler and guidance settings."""
        other = copy.copy(self)
        other._set_denoiser(config)
        return other

    def _set_denoiser(self, config: RunConfig) -> None:
        guidance = config.guidance
        null = self._reader.null_condition() if guidance.scale > 1 else None
        if guidance.method == "autoguidance":
            raise UserError(
                "guidance.method is autoguidance, which text-to-image models do not have: write cfg"
            )
        self.config = config
        self._denoiser = Denoiser(
            config,
            self._backend,
            self._flow,
            self.model.head,
            null_label=null,
            # The grid of n evaluations has n + 1 points.
            ode_points=config.sampler.params.num_steps + 1,
        )

    def tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of requests, up to where the image starts; every process calls it.

        Raises:
            UserError: the model answered a prompt without an image.
        """
        form, tokenizer = self.form, self.tokenizer
        if isinstance(tokenizer, PromptTokenizer):
            return [tokenizer.row(prompt, form.request)[0].tolist() for prompt in prompts]
        requests = [form.request.replace("{caption}", prompt) for prompt in prompts]
        rows = [tokenizer.prompt(request) for request in requests]
        if not form.write_text:
            before = tokenizer.encode(f"{form.answer}\n") if form.answer else []
            return [[*row, *before, tokenizer.image_start] for row in rows]
        stop = StopTokens(tokenizer.turn_end, tokenizer.image_start)
        answers = self._write_answers(rows, stop)
        for prompt, answer in zip(prompts, answers, strict=True):
            if not answer or answer[-1] != tokenizer.image_start:
                raise UserError(
                    f"the model answered {prompt!r} without an image: "
                    f"{tokenizer.decode(answer)!r}; ask for one, or leave out --write-text"
                )
        return [[*row, *answer] for row, answer in zip(rows, answers, strict=True)]

    def _write_answers(self, rows: Sequence[Sequence[int]], stop: StopTokens) -> list[list[int]]:
        """Return the tokens that the model writes after each request, divided among processes."""
        backend = self._backend
        share = 1 if backend.name == "xla" else backend.process_count  # XLA: one common program
        own = rows[backend.process_index :: share] if share > 1 else rows
        size = 1 if backend.on_cpu else TEXT_BATCH
        found: list[list[int]] = []
        with backend.autocast():
            for start in range(0, len(own), size):
                part = own[start : start + size]
                answers = generate(self.model, part, stop, max_new_tokens=self.form.max_new_tokens)
                found += [answer.ids for answer in answers]
        if share == 1:
            return found
        shares = [json.loads(text) for text in backend.all_gather_text(json.dumps(found))]
        return [shares[i % share][i // share] for i in range(len(rows))]

    def rows(
        self, prompts: Sequence[str], tokens: Sequence[Sequence[int]], numbers: Sequence[int]
    ) -> dict[str, Tensor]:
        """Return the rows of images.

        Args:
            prompts: of each image.
            tokens: of each prompt, from :meth:`tokens`.
            numbers: of each image among those of its prompt.
        """
        return {
            "indices": torch.arange(len(prompts), dtype=torch.int32),
            "numbers": torch.tensor(numbers, dtype=torch.int32),
            "keys": torch.tensor([noise_key(prompt) for prompt in prompts], dtype=torch.int32),
            **self._reader.rows(tokens),
        }

    @torch.no_grad()
    def _sample_latents(self, seed: int, batch: Batch, progress: Progress | None) -> Tensor:
        """Return the latents of a batch, restored from the model's statistics.

        Random draw 0 is the initial noise, draw k + 1 the noise of SDE step k.
        """
        self._rae.eval()
        self.model.eval()
        conditions = self._reader.read(batch)

        def noise(draw: int) -> Tensor:
            placed = self._backend.shard_batch({"draw": torch.tensor(draw).int()})
            function = self._noise_function(seed)
            return function(batch["keys"], batch["numbers"], placed["draw"])

        latents = self._denoiser(noise(0), conditions, lambda step, _: noise(step + 1), progress)
        return self.model.restore_latents(latents)

    def _noise_function(self, seed: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return a compiled function: keys (B, 2), numbers (B,), a 0-d draw to noise (B, ...)."""
        if seed not in self._noise_functions:

            def noise(keys: Tensor, numbers: Tensor, draw: Tensor) -> Tensor:
                # Each row has a key of its own, from its prompt.
                steps, rows = keys[:, :1] + draw * _DRAW_STRIDE, keys[:, 1] ^ numbers
                if not runs_eagerly(keys.device):
                    draws = CounterRNG(seed, steps, rows)
                    return draws.normal("prompt noise", self.latent_size)
                # In place and block by block, which takes a single key.
                parts = [
                    CounterRNG(seed, step[0], row[None]).normal("prompt noise", self.latent_size)
                    for step, row in zip(steps, rows, strict=True)
                ]
                return torch.cat(parts)

            self._noise_functions[seed] = self._backend.compile(noise)
        return self._noise_functions[seed]

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images (B, H, W, 3) uint8 of latents (B, C, h, w), on the devices."""
        return self._decode(latents)

    def _to_pixels(self, latents: Tensor) -> Tensor:
        if not self._rae.reshape_to_2d:
            latents = latents.flatten(2).transpose(1, 2)
        return super()._to_pixels(latents)
