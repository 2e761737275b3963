"""Resizing against ``torch.nn.functional.interpolate``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rae_xla.ops.resize import resize_bicubic, resize_bilinear

SIZES = [
    ((256, 256), (224, 224)),
    ((512, 512), (448, 448)),
    ((40, 48), (56, 56)),
    ((20, 36), (32, 32)),
    ((333, 500), (448, 448)),
    ((1080, 64), (224, 224)),
    ((7, 5), (9, 5)),
    ((1, 1), (4, 4)),
    ((6, 6), (1, 1)),
]


@pytest.mark.parametrize(("source", "target"), SIZES)
@pytest.mark.parametrize(
    ("resize", "mode"), [(resize_bicubic, "bicubic"), (resize_bilinear, "bilinear")]
)
def test_resize_equals_interpolate(resize, mode, source, target) -> None:
    images = torch.rand(2, 3, *source, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(images, size=target, mode=mode, align_corners=False)
    torch.testing.assert_close(resize(images, target), expected, atol=1e-5, rtol=0)


def test_resize_to_same_size_is_identity() -> None:
    images = torch.rand(1, 3, 17, 17)
    assert torch.equal(resize_bicubic(images, 17), images)


def test_scalar_size_is_square() -> None:
    images = torch.rand(1, 3, 8, 12)
    assert torch.equal(resize_bicubic(images, 6), resize_bicubic(images, (6, 6)))


def test_resize_gradient_equals_interpolate() -> None:
    grads = []
    for resize in (
        lambda x: resize_bicubic(x, 7),
        lambda x: F.interpolate(x, size=(7, 7), mode="bicubic", align_corners=False),
    ):
        images = torch.linspace(0, 1, 5 * 5).reshape(1, 1, 5, 5).requires_grad_()
        resize(images).square().sum().backward()
        grads.append(images.grad)
    torch.testing.assert_close(*grads)


def test_resize_is_float32_under_autocast() -> None:
    images = torch.rand(1, 3, 16, 16)
    plain = resize_bicubic(images, 14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize_bicubic(images, 14), plain)


def test_resize_preserves_bfloat16() -> None:
    images = torch.rand(1, 3, 16, 16)
    resized = resize_bicubic(images.bfloat16(), 14)
    assert resized.dtype == torch.bfloat16
    torch.testing.assert_close(resized.float(), resize_bicubic(images, 14), atol=0.02, rtol=0)


def test_compiles_without_graph_break() -> None:
    images = torch.rand(1, 3, 16, 20)
    compiled = torch.compile(resize_bicubic, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images, (14, 14)), resize_bicubic(images, (14, 14)))
