"""Sampling steps on XLA: compiled once, without fallback to the host, equal to the CPU."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("torch_xla")
os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("CPU_NUM_DEVICES", "4")

import numpy as np
import torch_xla
import torch_xla.debug.metrics as met
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr

from rae_xla.errors import UserError
from rae_xla.transport import create_transport, guided

pytestmark = pytest.mark.xla


def shape(size: int) -> tuple[int, ...]:
    """Return a shape that differs between tests, so that they do not share compiled graphs."""
    return (8, 4, size, size)


class TinyNet(nn.Module):
    """Small network from image, time and label to a velocity."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(4, 4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        condition = (self.labels(y) + torch.sin(3 * t)[:, None])[:, :, None, None]
        return torch.tanh(self.conv(x) + condition) - 0.5 * x


@pytest.fixture(scope="module")
def mesh() -> xs.Mesh:
    xr.use_spmd()
    n = xr.global_runtime_device_count()
    return xs.Mesh(np.arange(n), (n,), ("data",))


@pytest.fixture(scope="module")
def net() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet().eval()


@pytest.fixture(scope="module")
def xla_net(mesh: xs.Mesh, net: TinyNet) -> TinyNet:
    return copy.deepcopy(net).to(torch_xla.device())


def on_mesh(x: Tensor, mesh: xs.Mesh) -> Tensor:
    x = x.to(torch_xla.device())
    xs.mark_sharding(x, mesh, ("data",) + (None,) * (x.dim() - 1))
    torch_xla.sync()
    return x


def compile_step(step: Any) -> Any:
    return torch_xla.compile(step, full_graph=True, name="sampling_step")


def compilations() -> int:
    data = met.metric_data("CompileTime")
    return 0 if data is None else data[0]


def fallbacks() -> list[str]:
    fetch = "aten::_local_scalar_dense"
    return [n for n in met.counter_names() if n.startswith("aten::") and n != fetch]


def branches_of(grid: Tensor, stages: int) -> int:
    """Return the number of different combinations of guided stages, those in (0.3, 0.8)."""
    guided_at = [0.3 <= float(t) <= 0.8 for t in grid]
    return len({tuple(guided_at[i : i + stages]) for i in range(len(grid) - 1)})


@pytest.mark.parametrize(("method", "stages", "size"), [("euler", 1, 3), ("heun", 2, 4)])
def test_ode_steps_compile_once_per_branch(
    method: str, stages: int, size: int, mesh: xs.Mesh, net: TinyNet, xla_net: TinyNet
) -> None:
    tr = create_transport(time_dist_shift=2.0)
    noise, y = torch.randn(shape(size)), torch.arange(8) % 3
    options: dict[str, Any] = {"scale": 2.0, "interval": (0.3, 0.8)}
    expected = tr.sample_ode(guided(net, y, **options), noise, method, 21)

    x, labels = on_mesh(noise, mesh), on_mesh(y, mesh)
    before = compilations()

    def sample() -> Tensor:
        model_fn = guided(xla_net, labels, **options)
        return tr.sample_ode(model_fn, x, method, 21, compile_step=compile_step)

    actual = sample()
    assert compilations() - before == branches_of(tr.time_grid(21), stages)
    assert_close(actual.cpu(), expected, rtol=0, atol=1e-5)

    # Another batch and another guided object use the same graphs.
    before = compilations()
    sample()
    assert compilations() == before
    assert fallbacks() == []


@pytest.mark.parametrize(("method", "size"), [("euler", 5), ("heun", 6)])
def test_unguided_sampling_compiles_one_step(
    method: str, size: int, mesh: xs.Mesh, net: TinyNet, xla_net: TinyNet
) -> None:
    tr, noise, y = create_transport(), torch.randn(shape(size)), torch.zeros(8, dtype=torch.int64)
    expected = tr.sample_ode(lambda x, t: net(x, t, y), noise, method, 21)
    x, labels = on_mesh(noise, mesh), on_mesh(y, mesh)
    before = compilations()
    actual = tr.sample_ode(
        lambda x, t: xla_net(x, t, labels), x, method, 21, compile_step=compile_step
    )
    assert compilations() - before == 1
    assert_close(actual.cpu(), expected, rtol=0, atol=1e-5)
    assert fallbacks() == []


@pytest.mark.parametrize(("method", "size"), [("euler", 7), ("heun", 8)])
def test_sde_step_and_last_step_compile_once(
    method: str, size: int, mesh: xs.Mesh, net: TinyNet, xla_net: TinyNet
) -> None:
    tr, noise, y = create_transport(), torch.randn(shape(size)), torch.ones(8, dtype=torch.int64)
    draws = torch.randn(20, *shape(size))
    options: dict[str, Any] = {"method": method, "num_steps": 21}
    expected = tr.sample_sde(
        lambda x, t: net(x, t, y), noise, step_noise=lambda k, like: draws[k], **options
    )
    x, labels = on_mesh(noise, mesh), on_mesh(y, mesh)
    before = compilations()
    actual = tr.sample_sde(
        lambda x, t: xla_net(x, t, labels),
        x,
        step_noise=lambda k, like: draws[k].to(like.device),
        compile_step=compile_step,
        **options,
    )
    assert compilations() - before == 2
    assert_close(actual.cpu(), expected, rtol=0, atol=1e-5)
    assert fallbacks() == []


def test_training_times_are_computed_on_device(mesh: xs.Mesh) -> None:
    tr = create_transport(time_dist_type="logit-normal_0_1", time_dist_shift=6.93)
    u = torch.rand(64)
    assert_close(
        tr.sample_times(u.to(torch_xla.device())).cpu(), tr.sample_times(u), rtol=0, atol=1e-5
    )
    assert fallbacks() == []


def test_adaptive_method_raises(mesh: xs.Mesh, xla_net: TinyNet) -> None:
    x = torch.zeros(shape(4)).to(torch_xla.device())
    with pytest.raises(UserError, match="not possible on XLA"):
        create_transport().sample_ode(lambda x, t: x, x, method="dopri5")
