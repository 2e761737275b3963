"""Train steps of a model and a discriminator on one process, or on several that are forked.

``python distributed_steps.py FOLDER COUNT DATA`` forks COUNT processes with DATA copies of the
state. Each takes the steps on its rows and saves its results as ``FOLDER/RANK.pt``;
``runtime/torch/test_distributed_backend.py`` compares them with those of one process.
"""

import os
import socket
import sys
from pathlib import Path

import torch
from torch import nn

from rae_xla.checkpoint.train_state import make_state
from rae_xla.config import MeshConfig
from rae_xla.config.schema import IciMesh, RuntimeConfig
from rae_xla.models.dino_vit import DINOViT, DINOViTConfig
from rae_xla.models.discriminator import DinoDiscriminator
from rae_xla.models.dit_dh import DiTDH
from rae_xla.models.gan_losses import hinge_d
from rae_xla.runtime import start
from rae_xla.train.ema import update_ema
from rae_xla.train.optimizers import AdamW
from rae_xla.train.train_step import apply_gradients

ROWS = 8


def start_backend(data=1):
    settings = RuntimeConfig(backend="torch")
    return start(settings, MeshConfig(ici=IciMesh(data=data)))


def build_model():
    """A small DiT-DH without zero weights, whose gradients would be zero too."""
    torch.manual_seed(0)
    model = DiTDH(2, 1, 8, [32, 48], [2, 1], [4, 4], num_classes=4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def build_discriminator():
    torch.manual_seed(1)
    shape = DINOViTConfig(depth=1, embed_dim=32, num_heads=2, patch_size=32)
    return DinoDiscriminator(DINOViT(shape), ks=3).train()


def model_loss(model, rows):
    """A loss that is the mean of one number for each row."""
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(ROWS, 8, 2, 2, generator=generator), torch.linspace(0.1, 0.9, ROWS)
    y, dropped = torch.arange(ROWS) % 4, torch.arange(ROWS) == 3
    output = model(x[rows], t[rows], y[rows], label_drop=dropped[rows])
    return output.square().mean()


def discriminator_loss(disc, rows):
    """A loss of real and fake images, after a forward pass without gradients, as in a GAN step."""
    generator = torch.Generator().manual_seed(3)
    real, fake = torch.randn(2, len(disc.heads), ROWS, 49, 32, generator=generator)
    with torch.no_grad():
        disc.heads_forward(list(real[:, rows]))
    return hinge_d(disc.heads_forward(list(real[:, rows])), disc.heads_forward(list(fake[:, rows])))


def train_steps(backend):
    """Update a model twice and a discriminator once; return sizes, losses and the new state."""
    rows = torch.arange(ROWS).chunk(backend.process_count)[backend.process_index]
    own_parts = backend.own_parts(build_model())
    state = make_state(build_model(), backend, disc=build_discriminator())
    model, disc = state.model.module, state.disc.module
    found = {
        "bytes": sum(
            part.numel() * part.element_size()
            for module in (model, state.ema)
            for part in backend.local_shards(list(module.parameters()))
        )
        + sum(
            part.numel() * part.element_size()
            for part in backend.local_shards(list(state.model.optimizer_tensors().values()))
        ),
        "names": [name for name, _ in model.named_parameters()],
        "shapes": {n: tuple(p.shape) for n, p in model.named_parameters()},
        "shards": {
            n: tuple(part.shape)
            for (n, _), part in zip(
                model.named_parameters(),
                backend.local_shards(list(model.parameters())),
                strict=True,
            )
        },
    }
    optimizer = AdamW(betas=(0.9, 0.95), eps=1e-3, weight_decay=0.01)
    norms = []
    for count, (trained, loss_fn) in enumerate(
        [(state.model, model_loss), (state.model, model_loss), (state.disc, discriminator_loss)]
    ):
        for parameter in trained.parameters().values():
            parameter.grad = None
        for _ in range(2):  # gradient accumulation, here of the same rows twice
            loss = loss_fn(trained.module, rows) / 2
            loss.backward()
        [loss] = backend.global_mean([loss.detach()])
        norm, skipped = apply_gradients(
            trained, optimizer, loss, torch.tensor(1e-2), torch.tensor(count), backend, 1.0
        )
        norms.append((loss.item(), norm.item(), skipped.item()))
        if trained is state.model:
            update_ema(state.ema, model, 0.5, backend.local_shards)
    one_is_broken = torch.tensor(float("nan") if backend.process_index == 0 else 1.0)
    [broken] = backend.global_mean([one_is_broken])
    *_, skipped = apply_gradients(
        state.model, optimizer, broken, torch.tensor(1e-2), torch.tensor(2), backend
    )
    tensors = {
        **{f"model/{n}": t for n, t in model.state_dict().items()},
        **{f"ema/{n}": t for n, t in state.ema.state_dict().items()},
        **{f"disc/{n}": t for n, t in disc.state_dict().items()},
        **{f"moment/{n}": t for n, t in state.model.optimizer_tensors().items()},
    }
    again = backend.place(nn.ModuleDict({"model": model, "frozen": nn.Linear(2, 2)}))
    return found | {
        "norms": norms,
        "own parts": own_parts,
        "skipped": skipped.item(),
        "snapshot": backend.snapshot(tensors),
        "placed once": again["model"] is model and type(again["frozen"].weight) is nn.Parameter,
        "rows": backend.to_host({"row": rows, "flags": rows > 2, "step": torch.tensor(5)}),
        "texts": backend.all_gather_text(f"process {backend.process_index}"),
    }


def fork_processes(folder, count, function) -> int:
    """Run ``function`` in processes of one run; save the results as ``FOLDER/RANK.pt``.

    Returns:
        0, or the exit status of a process that failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(count):
        if (pid := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            torch.save(function(), Path(folder) / f"{rank}.pt")
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    return max(map(abs, codes))


def main(folder: str, count: int, data: int) -> None:
    sys.exit(fork_processes(folder, count, lambda: train_steps(start_backend(data))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
