"""Registry of device-specific operations: order, fall-through, removal."""

import pytest
import torch
from torch.nn import functional as F

from rae_xla.ops import dispatch
from rae_xla.ops.attention import attention


def test_latest_registration_is_tried_first_and_removed_on_exit():
    def first(*_):
        return "first"

    def second(*_):
        return "second"

    with dispatch.register("attention", "cpu", first):
        registration = dispatch.register("attention", "cpu", second)
        assert dispatch.call("attention", "cpu") == "second"
        registration.remove()
        registration.remove()
        assert dispatch.call("attention", "cpu") == "first"
    assert dispatch.implementations("attention", "cpu") == ()
    assert dispatch.call("attention", "cpu") is None


def test_implementation_that_returns_none_is_passed_over():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    calls = []

    def unsupported(*tensors):
        calls.append(len(tensors))

    with dispatch.register("attention", "cpu", unsupported):
        assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert calls == [3]


def test_attention_with_dropout_is_always_generic():
    q = torch.randn(1, 2, 4, 8)
    with dispatch.register("attention", "cpu", lambda *_: pytest.fail("called")):
        attention(q, q, q, dropout=0.5)


def test_dispatch_does_not_break_a_compiled_graph():
    q, k, v = torch.randn(3, 1, 2, 4, 8)

    def negated(query, key, value):
        return -F.scaled_dot_product_attention(query, key, value)

    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(compiled(q, k, v), expected)
    with dispatch.register("attention", "cpu", negated):
        torch.testing.assert_close(compiled(q, k, v), -expected)
    torch.testing.assert_close(compiled(q, k, v), expected)


def test_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="convolution"):
        dispatch.register("convolution", "cpu", lambda: None)


@pytest.mark.parametrize(("device", "static"), [("xla", True), ("cpu", False), ("cuda", False)])
def test_static_graph_devices(device, static):
    assert dispatch.requires_static_graph(torch.device(device)) is static
