"""The counter of memory, traffic and communication, on tensors whose sizes are known."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from rae_xla.runtime.torch.compat import fake_processes
from rae_xla.tools.plan.gpu.compat import (
    compiled_without_kernels,
    fake_tensors,
    forget_example_values,
)
from rae_xla.tools.plan.gpu.storages import ALIGNMENT, OTHER, StepCounter

SIZE = 1024  # numbers of a tensor
BYTES = 4 * SIZE


def test_the_peak_is_that_of_tensors_alive_at_the_same_time():
    with StepCounter() as counter:
        first = torch.zeros(SIZE)
        second = first + 1
        del first
        third = second * 2
        assert counter.live == {OTHER: 2 * BYTES}
        del second, third
    assert counter.totals.peak == 2 * BYTES
    assert counter.live == {}


def test_views_have_no_memory_and_in_place_operations_need_none():
    with StepCounter() as counter:
        tensor = torch.zeros(4, SIZE // 4)
        tensor.t().reshape(2, -1)[:1]  # the reshape copies
        peak = counter.totals.peak
        operations = counter.totals.operations
        tensor.t().view(-1, 2, 2).add_(1)
    assert peak == 2 * BYTES
    assert counter.totals.peak == peak
    assert counter.totals.operations == operations + 1


def test_small_tensors_take_a_whole_unit_of_the_allocator():
    with StepCounter() as counter:
        tensors = [torch.zeros(()) for _ in range(3)]
    assert counter.totals.peak == len(tensors) * ALIGNMENT


def test_what_autograd_saves_stays_alive_until_the_backward_pass():
    weight = torch.zeros(SIZE, requires_grad=True)
    with StepCounter() as counter:
        counter.label("parameters", [weight])
        loss = (weight * 2).sigmoid().sum()
        saved = counter.live[OTHER]
        loss.backward()
        del loss
        assert counter.live == {"parameters": BYTES, OTHER: BYTES}  # the gradient
    assert saved == BYTES + ALIGNMENT


def test_a_resized_storage_counts_with_its_new_size():
    with StepCounter() as counter:
        tensor = torch.zeros(SIZE)
        tensor.untyped_storage().resize_(0)
        assert counter.live == {}
        tensor.untyped_storage().resize_(2 * BYTES)
        assert counter.live == {OTHER: 2 * BYTES}
    assert counter.totals.peak == 2 * BYTES


def test_kinds_at_the_peak():
    state = torch.zeros(SIZE)
    with StepCounter() as counter:
        assert counter.label("parameters", [state, state[1:]]) == 2 * BYTES  # one storage
        counter.begin()
        torch.zeros(2 * SIZE)
    assert counter.totals.peak_by_kind == {"parameters": BYTES, OTHER: 2 * BYTES}


def test_flops_and_bytes():
    a, b = torch.zeros(2, 3), torch.zeros(3, 5)
    q = torch.zeros(1, 2, 8, 4, requires_grad=True)
    with StepCounter() as counter:
        product = a @ b
        assert counter.totals.flops == 2 * 2 * 3 * 5
        assert counter.totals.product_bytes == 4 * (6 + 15 + 10)
        product.sigmoid()
        assert counter.totals.other_bytes == 4 * (10 + 10)
        counter.begin()
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    forward = 2 * (2 * 2 * 8 * 8 * 4)  # two products of 2 heads
    assert counter.totals.flops == forward * (1 + 2.5)


def test_fake_tensors_are_counted_like_real_ones():
    def work() -> int:
        with StepCounter() as counter:
            layer = torch.nn.Linear(64, 64)
            layer(torch.zeros(16, 64)).square().mean().backward()
            return counter.totals.peak

    with fake_tensors():
        on_fake = work()
    assert on_fake == work()


def test_layer_norm_of_a_compiled_function_under_the_rules_of_cuda():
    from rae_xla.tools.plan.gpu.compat import cuda_autocast_rules

    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with cuda_autocast_rules():
            assert torch.nn.functional.layer_norm(x, (8,)).dtype is torch.float32
        assert torch.nn.functional.layer_norm(x, (8,)).dtype is torch.bfloat16


@pytest.mark.parametrize("fake", [False, True])
def test_collectives_of_processes_that_do_not_exist(fake):
    with fake_processes(4):
        pair = dist.new_group([0, 1])
        with fake_tensors() if fake else torch.no_grad(), StepCounter() as counter:
            gathered, part = torch.zeros(4 * SIZE), torch.zeros(SIZE)
            dist.all_gather_into_tensor(gathered, part)
            dist.reduce_scatter_tensor(part, gathered)
            dist.all_reduce(part, group=pair)
            dist.all_reduce(part, group=pair)
        sent = counter.totals.sent
    everyone = (0, 1, 2, 3)
    assert sent["all-gather", everyone] == (1, 3 * BYTES)
    assert sent["reduce-scatter", everyone] == (1, 3 * BYTES)
    assert sent["all-reduce", (0, 1)] == (2, 2 * BYTES)  # a ring sends each number twice
    assert not dist.is_initialized()


@pytest.mark.slow
def test_a_compiled_step_on_fake_tensors_keeps_nothing_of_its_first_call():
    """The graphs would keep the gradients of the first call, and the peak be that of two."""

    def count() -> StepCounter:
        layer = torch.nn.Linear(64, 64)

        def step(x: torch.Tensor) -> None:
            layer(x).sigmoid().sum().backward()
            with torch.no_grad():
                torch._foreach_sub_(list(layer.parameters()), [p.grad for p in layer.parameters()])
            layer.zero_grad(set_to_none=True)

        with compiled_without_kernels(), StepCounter() as counter:
            compiled, x = torch.compile(step), torch.zeros(16, 64)
            compiled(x)
            forget_example_values()
            counter.begin()
            compiled(x)
        return counter

    real = count().totals
    with fake_tensors():
        fake = count().totals
    assert fake.operations == real.operations > 0
    assert fake.peak == real.peak
