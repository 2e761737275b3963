"""A step copies nothing from the host to the device: the host would wait for the device."""

import pytest
import torch
from copies import HostCopies

from rae_xla.evaluate.inception import resize_like_tensorflow1
from rae_xla.ops.random import CounterRNG
from rae_xla.ops.resize import resize_bicubic, resize_bilinear
from rae_xla.transport import create_transport


def images():
    return torch.empty(2, 3, 16, 16, device="meta")


def draw():
    rows = torch.zeros(4, dtype=torch.int32, device="meta")
    draws = CounterRNG(1, torch.zeros((), dtype=torch.int32, device="meta"), rows)
    return [draws.normal("a", (3,)), *draws.uniforms("b", "c"), draws.batch_uniform("d", 2)]


@pytest.mark.parametrize(
    "work",
    [
        lambda: resize_bicubic(images(), 7),
        lambda: resize_bilinear(images(), (9, 20)),
        lambda: resize_like_tensorflow1(images(), 29),
        draw,
    ],
    ids=["bicubic", "bilinear", "inception", "draws"],
)
def test_a_step_needs_no_copy_from_the_host(work):
    with HostCopies() as copies:
        work()
    assert copies.shapes == []


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_the_times_of_all_ode_steps_are_copied_at_once(method):
    with HostCopies() as copies:
        create_transport().sample_ode(lambda x, t: x, images(), method=method, num_steps=20)
    assert len(copies.shapes) == 1


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_times_of_all_sde_steps_are_copied_at_once(method):
    with HostCopies() as copies:
        create_transport().sample_sde(
            lambda x, t: x, images(), method=method, num_steps=20, last_step="Mean"
        )
    assert len(copies.shapes) == 2  # the last step is another function


def test_copies_are_seen():
    with HostCopies() as copies:
        torch.ones(3).to("meta")
        torch.empty(2, device="meta").copy_(torch.ones(2))
    assert copies.shapes == [(3,), (2,)]
