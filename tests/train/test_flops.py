"""FLOPs of a step equal the published numbers, and counting changes nothing."""

from pathlib import Path

import pytest
import torch
from tiny import make_configs, make_gan_config, make_shards
from torch import Tensor, nn

from rae_xla.config import RuntimeConfig, load_config
from rae_xla.data.mixture import open_training_data
from rae_xla.models.dit_dh import DiTDH
from rae_xla.runtime.torch.backend import TorchBackend
from rae_xla.train.flops import count_flops, phase_flops, step_flops
from rae_xla.train.tasks.autoencoder import AutoencoderTask
from rae_xla.train.tasks.diffusion import DiffusionTask

# TFLOP per image, forward and backward, of 256 latent tokens: two sizes of the RAE paper.
PUBLISHED = {
    "S": ([384, 2048], [12, 2], [6, 16], 0.29),
    "XL": ([1152, 2048], [28, 2], [16, 16], 0.97),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_models_have_the_published_flops(size):
    width, depth, heads, expected = PUBLISHED[size]
    with torch.device("meta"):
        model = DiTDH(input_size=16, patch_size=1, in_channels=768, hidden_size=width,
                      depth=depth, num_heads=heads)  # fmt: skip
        latents, times = torch.zeros(1, 768, 16, 16), torch.zeros(1)
        labels = torch.zeros(1, dtype=torch.int64)
    flops = count_flops(lambda: model(latents, times, labels).sum().backward())
    assert flops / 1e12 == pytest.approx(expected, abs=0.006)


def test_matmuls_convolutions_and_attention_are_counted():
    linear, conv = nn.Linear(8, 16), nn.Conv2d(3, 4, 2, 2)
    x, image = torch.zeros(5, 8), torch.zeros(2, 3, 6, 6)
    forward = 2 * 5 * 8 * 16
    assert count_flops(lambda: linear(x)) == forward
    # The weight needs a gradient, the input does not.
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


def make_task(cls, path):
    config = load_config(str(path))
    backend = TorchBackend(RuntimeConfig(), config.mesh)
    return cls(config, backend, open_training_data(config.data.train, None), 6)


def all_tensors(task) -> dict[str, Tensor]:
    held = {"model": task.model, "disc": task.disc, "frozen": task.frozen}
    return {
        f"{part}.{name}": tensor
        for part, module in held.items()
        if module is not None
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def test_stage_2_is_encoder_forward_plus_model_forward_and_backward(project):
    task = make_task(DiffusionTask, project["stage2"])
    model, encode = task.model, task.frozen.encode
    image, y, t = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    encoder = count_flops(lambda: encode(image))
    model_flops = count_flops(lambda: model(torch.zeros(1, 32, 4, 4), t, y).sum().backward())
    assert encoder > 0
    assert step_flops(task, 0, image_size=32) == encoder + model_flops


@pytest.mark.slow
def test_every_gan_phase_is_counted_and_networks_are_unchanged(project):
    task = make_task(AutoencoderTask, project["gan"])
    before = {name: tensor.clone() for name, tensor in all_tensors(task).items()}
    flops = phase_flops(task, 0, 20, image_size=32)
    assert list(flops) == [task.phase(step) for step in (0, 6, 12)]
    lpips, disc, gan = flops.values()
    assert lpips < disc < gan
    for name, tensor in all_tensors(task).items():
        assert tensor.grad is None, name
        assert torch.equal(tensor, before[name]), name
    assert step_flops(task, 0, image_size=32, rows=2) == lpips
