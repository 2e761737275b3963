"""Loss networks with RANDOM weights, in the published formats: VGG16 and a small DINO ViT.

The published ones are trained on photographs. On 32-pixel digits, and without network access, these
let every part of the stage-1 recipe run; the values of LPIPS and of the discriminator are then
meaningless.

    python scripts/quickstart/random_loss_networks.py --out results/quickstart/networks
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from rae_xla.models.dino_vit import DINOViT, resolve_recipe

RECIPE = {"depth": 2, "embed_dim": 64, "num_heads": 4, "patch_size": 32}


def random_network(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a network with reproducible random weights that preserve the scale of activations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make()
        for parameter in network.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
    return network


def write_vgg16(path: Path, seed: int = 0) -> Path:
    """Write a VGG16 in the format of torchvision, without its classifier, and return the path."""
    network = random_network(lambda: nn.ModuleDict({"features": make_layers(cfgs["D"])}), seed)
    torch.save(network.state_dict(), path)
    return path


def write_dino(path: Path, recipe: Mapping[str, float], seed: int = 0) -> Path:
    """Write a backbone of the discriminator in the published format and return the path.

    Its position embeddings are random too, so that tokens differ by position as in a trained one.
    """
    backbone = cast("DINOViT", random_network(lambda: DINOViT(resolve_recipe(recipe)), seed))
    nn.init.normal_(backbone.pos_embed, generator=torch.Generator().manual_seed(seed))
    torch.save(backbone.state_dict(), path)
    return path


def main() -> None:
    """Run the command line: write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    print(write_vgg16(out / "vgg16.pth"))
    print(write_dino(out / "dino.pth", RECIPE))


if __name__ == "__main__":
    main()
