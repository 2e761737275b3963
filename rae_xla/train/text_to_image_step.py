"""The train step of the text-to-image model: two losses over the global batch, parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rae_xla.checkpoint.train_state import TrainedModule, TrainState
from rae_xla.models.text_to_image.slots import select_rows
from rae_xla.ops.random import CounterRNG
from rae_xla.ops.updates import AdamWScalars, average_
from rae_xla.runtime import Backend, Batch
from rae_xla.train.ema import update_power_averages
from rae_xla.train.muon import Muon
from rae_xla.train.optimizers import AdamW
from rae_xla.train.train_step import TrainStep, clear_gradients, split_micro_batches


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with an optimizer and a learning rate of their own.

    Attributes:
        name: for metrics.
        prefix: of the names of its parameters; empty for all that no earlier group has.
        optimizer: updates them.
        rate: name of their learning rate among the inputs of the step.
        ema_decay: of their moving average; 0: the average is the parameters themselves.
    """

    name: str
    prefix: str
    optimizer: AdamW | Muon
    rate: str
    ema_decay: float


@dataclass(frozen=True)
class RowLosses:
    """Sums of the losses of each row of a batch, and what they are divided by.

    Attributes:
        text: (B,) sums of the cross-entropy over supervised tokens.
        matches: (B,) supervised tokens that are predicted.
        image: (B,) or fewer rows, sums of the flow-matching loss over answer images.
    """

    text: Tensor
    matches: Tensor
    image: Tensor


@dataclass(frozen=True)
class RowCounts:
    """What the losses of each row are divided by: supervised tokens and answer images, (B,)."""

    tokens: Tensor
    images: Tensor


@dataclass(frozen=True)
class LossWeights:
    """Weights of the two losses in their sum."""

    text: float
    image: float


@dataclass(frozen=True)
class BySource:
    """Sums of losses and counts by the data source of a row, for metrics.

    Attributes:
        names: of the sources; empty with a single one, which needs no metrics of its own.
        row_pattern: of the rows for which the head runs.
    """

    names: tuple[str, ...] = ()
    row_pattern: tuple[int, int] = (1, 1)

    def sums(self, batch: Batch, text: Tensor, image: Tensor) -> Tensor:
        """Return the sums (2, sources) of values of all rows (B,) and of generating rows (R,)."""
        sources = torch.arange(len(self.names), device=text.device)
        belongs = (batch["source"][:, None] == sources).float()
        of_images = belongs if len(image) == len(text) else select_rows(belongs, self.row_pattern)
        # Not a product of matrices, which TPUs compute in bf16.
        sums = [
            (values.float()[:, None] * members).sum(0)
            for values, members in ((text, belongs), (image, of_images))
        ]
        return torch.stack(sums)


def make_text_to_image_step(
    losses: Callable[[Batch, CounterRNG], RowLosses],
    counts: Callable[[Batch], RowCounts],
    state: TrainState,
    groups: Sequence[ParameterGroup],
    weights: LossWeights,
    *,
    seed: int,
    clip_grad: float | None,
    accumulate: int,
    backend: Backend,
    skip_norm: float | None = None,
    by_source: BySource | None = None,
) -> TrainStep:
    """Build a step: random draws, both losses, backward, clipping, AdamW per group, EMA.

    The losses are means over all supervised tokens and over all answer images of the global batch,
    however it is divided into devices and micro-batches.

    Args:
        losses: returns the losses of the rows of a micro-batch.
        counts: returns what the losses of a batch are divided by.
        state: updated in place.
        groups: of the trained parameters.
        weights: of the two losses.
        seed: of the run.
        clip_grad: largest L2 norm of the whole gradient; None or 0 disables clipping.
        accumulate: number of micro-batches that the batch is split into.
        backend: holds the state.
        skip_norm: the update is skipped if the gradient's L2 norm is larger; None disables this.
        by_source: adds the loss of every data source to the metrics.
    """
    names = by_source.names if by_source is not None else ()

    def step(batch: Batch) -> dict[str, Tensor]:
        clear_gradients(state.model)
        of_rows = counts(batch)
        per_row = [of_rows.tokens.mean(), of_rows.images.mean()]
        tokens, images = (_at_least_tiny(x) for x in backend.global_mean(per_row))
        totals = [torch.zeros((), device=batch["row"].device) for _ in range(3)]
        of_sources: list[Tensor] = []
        for micro_batch in split_micro_batches(batch, accumulate):
            rng = CounterRNG(seed, micro_batch["step"], micro_batch["row"])
            with backend.autocast():
                found = losses(micro_batch, rng)
            rows = micro_batch["row"].shape[0] * accumulate
            text = found.text.float().sum() / rows / tokens
            image = found.image.float().sum() / rows / images
            (weights.text * text + weights.image * image).backward()
            matches = found.matches.float().sum() / rows / tokens
            parts = (text.detach(), image.detach(), matches)
            totals = [total + part for total, part in zip(totals, parts, strict=True)]
            if by_source is not None and names:
                of_sources.append(
                    by_source.sums(micro_batch, found.text.detach(), found.image.detach())
                )
        text, image, matches = backend.global_mean(totals)
        loss = weights.text * text + weights.image * image
        norms, skipped = _update(state.model, groups, batch, loss, backend, clip_grad, skip_norm)
        _average(state, groups, backend)
        update_power_averages(state, batch["step"], backend)
        [truncated] = backend.global_mean([batch["truncated"].mean()])
        source_losses: dict[str, Tensor] = {}
        if by_source is not None and names:
            both = [
                torch.stack(of_sources).sum(0),
                by_source.sums(batch, of_rows.tokens, of_rows.images),
            ]
            rows = batch["row"].shape[0]
            sums, numbers = backend.global_mean([part / rows for part in both])
            of_text, of_images = sums / _at_least_tiny(numbers)
            mixed = weights.text * of_text + weights.image * of_images
            source_losses = {f"train/loss/{n}": x for n, x in zip(names, mixed, strict=True)}
        return {
            "train/loss": loss,
            "train/text_loss": text,
            "train/image_loss": image,
            "train/token_accuracy": matches,
            "train/grad_norm": norms.pop("all"),
            **{f"train/grad_norm/{name}": norm for name, norm in norms.items()},
            **source_losses,
            "train/truncated": truncated,
            "train/skipped": skipped,
        }

    return TrainStep(step)


def _at_least_tiny(value: Tensor) -> Tensor:
    """Return ``value``; a batch without tokens or images has losses of 0, not 0 / 0."""
    return value.clamp(min=1e-8)


def group_names(trained: TrainedModule, groups: Sequence[ParameterGroup]) -> list[list[str]]:
    """Return the names of the trained parameters of each group; the first match decides."""
    names: list[list[str]] = [[] for _ in groups]
    for name in trained.parameters():
        index = next(i for i, group in enumerate(groups) if name.startswith(group.prefix))
        names[index].append(name)
    return names


@dataclass
class _Part(TrainedModule):
    """The parameters of one group of a module, and their moments."""

    names: Sequence[str]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the group, by name."""
        every = super().parameters()
        return {name: every[name] for name in self.names}


def _part(trained: TrainedModule, names: Sequence[str]) -> _Part:
    moments = {
        moment: {name: tensors[name] for name in names if name in tensors}
        for moment, tensors in trained.moments.items()
    }
    return _Part(trained.module, moments, names)


@torch.no_grad()
def _update(
    trained: TrainedModule,
    groups: Sequence[ParameterGroup],
    batch: Batch,
    loss: Tensor,
    backend: Backend,
    clip_grad: float | None,
    skip_norm: float | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Update every group, unless the loss or the whole gradient is not usable; clear the gradients.

    Returns:
        The norm of the whole gradient before clipping (``all``) and of each group, and 1 if the
        update was skipped, else 0.
    """
    parameters = trained.parameters()
    names = list(parameters)
    gradients = dict(zip(names, backend.global_gradients(list(parameters.values())), strict=True))
    members = group_names(trained, groups)
    norms = {
        group.name: backend.global_norm([gradients[name] for name in of])
        for group, of in zip(groups, members, strict=True)
        if of
    }
    norm = torch.stack([value.square() for value in norms.values()]).sum().sqrt()
    usable = torch.isfinite(norm) & torch.isfinite(loss)
    if skip_norm is not None:
        usable = usable & (norm <= skip_norm)
    factor = (clip_grad / (norm + 1e-6)).clamp(max=1.0) if clip_grad else None
    for group, of in zip(groups, members, strict=True):
        if not of:
            continue
        scalars = AdamWScalars(batch[group.rate], batch["step"], usable, factor)
        group.optimizer.apply(
            _part(trained, of), [gradients[name] for name in of], scalars, backend
        )
    clear_gradients(trained)
    return {"all": norm, **norms}, (~usable).float()


def _average(state: TrainState, groups: Sequence[ParameterGroup], backend: Backend) -> None:
    """Update the moving average of the parameters of each group with its decay."""
    averages = dict(state.ema.named_parameters())
    values = dict(state.model.module.named_parameters())
    for group, names in zip(groups, group_names(state.model, groups), strict=True):
        if names:
            average_(
                backend.local_shards([averages[name] for name in names]),
                backend.local_shards([values[name] for name in names]),
                group.ema_decay,
            )
