"""What each of several processes does with its rows and its part of a state, for
``runtime/test_torch_processes.py``: run as a script, it forks them, and each saves what it found.

``python work_of_processes.py FOLDER COUNT DATA`` has COUNT processes in a mesh of DATA copies.
"""

import os
import socket
import sys
from pathlib import Path

import torch
from torch import nn

from rae_xla.config import MeshConfig
from rae_xla.config.sections import IciMesh, RuntimeConfig
from rae_xla.models.dino_vit import DINOShape, DINOViT
from rae_xla.models.discriminator import DinoDiscriminator
from rae_xla.models.dit_dh import DiTDH
from rae_xla.models.gan_losses import hinge_d
from rae_xla.runtime import start
from rae_xla.train.adamw import AdamW
from rae_xla.train.state import make_state, update_ema
from rae_xla.train.step import apply_gradients

ROWS = 8


def start_runtime(data=1):
    settings = RuntimeConfig(backend="torch")
    return start(settings, MeshConfig(ici=IciMesh(data=data)))


def build_model():
    """A DiT-DH without zeros, which would hide gradients."""
    torch.manual_seed(0)
    model = DiTDH(2, 1, 8, [32, 48], [2, 1], [4, 4], num_classes=4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def build_discriminator():
    torch.manual_seed(1)
    shape = DINOShape(depth=1, embed_dim=32, num_heads=2, patch_size=32)
    return DinoDiscriminator(DINOViT(shape), ks=3).train()


def model_loss(model, rows):
    """The mean of a number for each row."""
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(ROWS, 8, 2, 2, generator=generator), torch.linspace(0.1, 0.9, ROWS)
    y, dropped = torch.arange(ROWS) % 4, torch.arange(ROWS) == 3
    made = model(x[rows], t[rows], y[rows], label_drop=dropped[rows])
    return made.square().mean()


def discriminator_loss(disc, rows):
    """As in a step: two kinds of images before the gradient, and one forward without."""
    generator = torch.Generator().manual_seed(3)
    real, fake = torch.randn(2, len(disc.heads), ROWS, 49, 32, generator=generator)
    with torch.no_grad():
        disc.heads_forward(list(real[:, rows]))
    return hinge_d(disc.heads_forward(list(real[:, rows])), disc.heads_forward(list(fake[:, rows])))


def work(runtime):
    """Two updates of a model and one of a discriminator; what is there and what became of it."""
    rows = torch.arange(ROWS).chunk(runtime.process_count)[runtime.process_index]
    state = make_state(build_model(), runtime, disc=build_discriminator())
    model, disc = state.model.module, state.disc.module
    found = {
        "bytes": sum(
            part.numel() * part.element_size()
            for module in (model, state.ema)
            for part in runtime.parts(list(module.parameters()))
        )
        + sum(
            part.numel() * part.element_size()
            for part in runtime.parts(list(state.model.optimizer_tensors().values()))
        ),
        "names": [name for name, _ in model.named_parameters()],
        "shapes": {n: tuple(p.shape) for n, p in model.named_parameters()},
        "split": {
            n: tuple(part.shape)
            for (n, _), part in zip(
                model.named_parameters(), runtime.parts(list(model.parameters())), strict=True
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
        for _ in range(2):  # two parts of a batch, here the same
            loss = loss_fn(trained.module, rows) / 2
            loss.backward()
        [loss] = runtime.average([loss.detach()])
        norm, skipped = apply_gradients(
            trained, optimizer, loss, torch.tensor(1e-2), torch.tensor(count), runtime, 1.0
        )
        norms.append((loss.item(), norm.item(), skipped.item()))
        if trained is state.model:
            update_ema(state.ema, model, 0.5, runtime.parts)
    one_is_broken = torch.tensor(float("nan") if runtime.process_index == 0 else 1.0)
    [broken] = runtime.average([one_is_broken])
    *_, skipped = apply_gradients(
        state.model, optimizer, broken, torch.tensor(1e-2), torch.tensor(2), runtime
    )
    tensors = {
        **{f"model/{n}": t for n, t in model.state_dict().items()},
        **{f"ema/{n}": t for n, t in state.ema.state_dict().items()},
        **{f"disc/{n}": t for n, t in disc.state_dict().items()},
        **{f"moment/{n}": t for n, t in state.model.optimizer_tensors().items()},
    }
    again = runtime.place(nn.ModuleDict({"model": model, "frozen": nn.Linear(2, 2)}))
    return found | {
        "norms": norms,
        "skipped": skipped.item(),
        "snapshot": runtime.snapshot(tensors),
        "placed once": again["model"] is model and type(again["frozen"].weight) is nn.Parameter,
        "rows": runtime.to_host({"row": rows, "flags": rows > 2, "step": torch.tensor(5)}),
        "said": runtime.exchange(f"process {runtime.process_index}"),
    }


def main(folder: str, count: int, data: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(count):
        if (pid := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            torch.save(work(start_runtime(data)), Path(folder) / f"{rank}.pt")
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
