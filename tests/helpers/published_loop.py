"""A train step in the way of the published loop: torch's AdamW, clipping, draws and a loop for EMA.

Model and loss are those of rae_xla, so that only the way of the step differs.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rae_xla.transport.transport import Transport


def clip_grad_norm_(model: nn.Module, max_norm: float, *, foreach: bool | None) -> None:
    """torch.nn.utils.clip_grad_norm_, which torch_xla replaces by one that refuses foreach."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters], foreach=foreach)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=foreach)


class PublishedLoop:
    """A model in training.

    Args:
        model: trained in place.
        transport: of the loss.
        lr: constant learning rate.
        decay: of the moving average.
        clip_grad: largest norm of the gradient.
        foreach: as in torch.optim; None is torch's choice: False on a CPU, True on CUDA.
    """

    def __init__(
        self,
        model: nn.Module,
        transport: Transport,
        *,
        lr: float = 2e-4,
        decay: float = 0.9995,
        clip_grad: float = 1.0,
        foreach: bool | None = None,
    ) -> None:
        self.model, self.ema = model.train(), copy.deepcopy(model).requires_grad_(False).eval()
        self._transport, self._decay, self._clip = transport, decay, clip_grad
        self._foreach = foreach
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=foreach
        )

    def step(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Train on latents (B, C, h, w) and labels (B,); returns the loss."""
        self._optimizer.zero_grad()
        losses = self._transport.training_losses(self.model, latents, {"y": labels})["loss"]
        loss = losses.mean()
        loss.backward()
        self.update()
        return loss.detach()

    def update(self) -> None:
        """Clip the gradients, and update the weights and their average."""
        clip_grad_norm_(self.model, self._clip, foreach=self._foreach)
        self._optimizer.step()
        averages = dict(self.ema.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                averages[name].mul_(self._decay).add_(parameter, alpha=1 - self._decay)
