"""FLOPs of a step: those of the published arithmetic, and nothing is changed by counting."""

from pathlib import Path

import pytest
import torch
from tiny import make_configs, make_gan_config, make_shards
from torch import Tensor, nn

from rae_xla.config import load_config
from rae_xla.data.mixture import open_training_data
from rae_xla.models.dit_dh import DiTDH
from rae_xla.runtime.torch import TorchRuntime
from rae_xla.train.flops import count_flops, phase_flops, step_flops
from rae_xla.train.stage1 import Stage1
from rae_xla.train.stage2 import Stage2

# TFLOP per image, forward and backward, of 256 latent tokens: two sizes of the RAE paper.
PUBLISHED = {
    "S": ([384, 2048], [12, 2], [6, 16], 0.29),
    "XL": ([1152, 2048], [28, 2], [16, 16], 0.97),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_models_take_the_published_arithmetic(size):
    width, depth, heads, expected = PUBLISHED[size]
    with torch.device("meta"):
        model = DiTDH(input_size=16, patch_size=1, in_channels=768, hidden_size=width,
                      depth=depth, num_heads=heads)  # fmt: skip
        latents, times = torch.zeros(1, 768, 16, 16), torch.zeros(1)
        labels = torch.zeros(1, dtype=torch.int64)
    flops = count_flops(lambda: model(latents, times, labels).sum().backward())
    assert flops / 1e12 == pytest.approx(expected, abs=0.006)


def test_products_convolutions_and_attention_are_counted_forwards_and_backwards():
    linear, conv = nn.Linear(8, 16), nn.Conv2d(3, 4, 2, 2)
    x, image = torch.zeros(5, 8), torch.zeros(2, 3, 6, 6)
    forward = 2 * 5 * 8 * 16
    assert count_flops(lambda: linear(x)) == forward
    # the input needs no gradient, the weight does
    assert count_flops(lambda: linear(x).sum().backward()) == 2 * forward
    assert count_flops(lambda: conv(image)) == 2 * 2 * 4 * 3 * 3 * (3 * 2 * 2)
    q = torch.zeros(1, 2, 7, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attention(q, q, q)) == 2 * (2 * 2 * 7 * 7 * 4)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("project")
    shards = make_shards(folder)
    return make_configs(folder, shards) | {"gan": make_gan_config(folder, shards)}


def stage_of(cls, path):
    config = load_config(str(path))
    runtime = TorchRuntime(mesh=config.mesh, precision="fp32", compile_graphs=False, seed=0)
    return cls(config, runtime, open_training_data(config.data.train, None), 6)


def everything(stage) -> dict[str, Tensor]:
    held = {"model": stage.model, "disc": stage.disc, "frozen": stage.frozen}
    return {
        f"{part}.{name}": tensor
        for part, module in held.items()
        if module is not None
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def test_a_step_of_stage_2_is_the_encoder_forwards_and_the_model_both_ways(project):
    stage = stage_of(Stage2, project["stage2"])
    model, encode = stage.model, stage.frozen.encode
    image, y, t = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    encoder = count_flops(lambda: encode(image))
    both_ways = count_flops(lambda: model(torch.zeros(1, 32, 4, 4), t, y).sum().backward())
    assert encoder > 0
    assert step_flops(stage, 0, image_size=32) == encoder + both_ways


@pytest.mark.slow
def test_every_phase_of_a_gan_is_counted_and_the_networks_stay_as_they_were(project):
    stage = stage_of(Stage1, project["gan"])
    before = {name: tensor.clone() for name, tensor in everything(stage).items()}
    flops = phase_flops(stage, 0, 20, image_size=32)
    assert list(flops) == [stage.phase(step) for step in (0, 6, 12)]
    lpips, learns, gan = flops.values()
    assert lpips < learns < gan
    for name, tensor in everything(stage).items():
        assert tensor.grad is None, name
        assert torch.equal(tensor, before[name]), name
    assert step_flops(stage, 0, image_size=32, rows=2) == lpips
