from __future__ import annotations

import pytest
import torch
from golden_case import load_case

from rae_xla.models.diffaug import diff_augment

CASE = load_case("disc/diffaug")
ROWS = [pytest.param(row, id=row["key"]) for row in CASE.meta["rows"]]
HEIGHT, WIDTH = CASE["in.x"].shape[-2:]


def draws_of(key: str) -> tuple[torch.Tensor, torch.Tensor]:
    return CASE[f"in.rand3.{key}"], CASE[f"in.rand7.{key}"].flatten(1).T


@pytest.mark.parametrize("row", ROWS)
def test_the_references_numbers(row: dict) -> None:
    flags, draws = draws_of(row["key"])
    found = diff_augment(CASE["in.x"], flags, draws, prob=row["prob"], cutout=row["cutout"])
    torch.testing.assert_close(found, CASE[f"out.{row['key']}"], atol=1e-6, rtol=1e-6)
    assert torch.equal(found, CASE["in.x"]) != row["changed"]


def test_gradient() -> None:
    images = CASE["in.x"].clone().requires_grad_()
    # Recorded for the draws of the first row.
    found = diff_augment(images, *draws_of("0.0"), prob=1.0, cutout=0.2)
    (found * CASE["in.grad_weight"]).sum().backward()
    torch.testing.assert_close(images.grad, CASE["grad.x"], atol=1e-6, rtol=1e-5)


def moved(images: torch.Tensor, rows: list[int], columns: list[int]) -> torch.Tensor:
    """Zero-padded translation, pixel by pixel."""
    out = torch.zeros_like(images)
    for sample, (down, right) in enumerate(zip(rows, columns, strict=True)):
        for h in range(HEIGHT):
            for w in range(WIDTH):
                if 0 <= h + down < HEIGHT and 0 <= w + right < WIDTH:
                    out[sample, :, h, w] = images[sample, :, h + down, w + right]
    return out


def test_every_translation_is_exact() -> None:
    images = CASE["in.x"][:1].expand(7, -1, -1, -1)
    draws = torch.full((7, 7), 0.5)
    draws[:, 0] = torch.tensor([(k % 5 + 0.5) / 5 for k in range(7)])  # 16 rows: ±2
    draws[:, 1] = torch.tensor([(k + 0.5) / 7 for k in range(7)])  # 24 columns: ±3
    found = diff_augment(images, torch.tensor([0.0, 1.0, 1.0]), draws, prob=0.5, cutout=0.0)
    rows, columns = [k % 5 - 2 for k in range(7)], [k - 3 for k in range(7)]
    assert torch.equal(found, moved(images, rows, columns))


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_draws_at_the_ends_of_their_range(draw: float) -> None:
    draws = torch.full((4, 7), draw)
    found = diff_augment(CASE["in.x"], torch.zeros(3), draws, prob=0.5, cutout=0.25)
    assert found.isfinite().all()
    shift = [-2] * 4 if draw == 0 else [2] * 4, [-3] * 4 if draw == 0 else [3] * 4
    only_moved = diff_augment(
        CASE["in.x"], torch.tensor([0.0, 1.0, 1.0]), draws, prob=0.5, cutout=0.25
    )
    assert torch.equal(only_moved, moved(CASE["in.x"], *shift))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    flags, draws = draws_of("0.0")
    whole = diff_augment(CASE["in.x"], flags, draws, prob=1.0, cutout=0.2)
    alone = diff_augment(CASE["in.x"][2:3], flags, draws[2:3], prob=1.0, cutout=0.2)
    torch.testing.assert_close(alone, whole[2:3], atol=1e-6, rtol=0)


def test_no_probability_is_the_identity() -> None:
    flags, draws = draws_of("0.0")
    found = diff_augment(CASE["in.x"], torch.zeros(3), draws, prob=0.0, cutout=0.2)
    assert torch.equal(found, CASE["in.x"])
    assert diff_augment(CASE["in.x"].double(), flags, draws, prob=0.0, cutout=0.2).dtype == (
        torch.float32
    )


@pytest.mark.parametrize("size", [1, 3, 4, 56, 100])
def test_images_of_any_size(size: int) -> None:
    images = torch.rand(2, 3, size, size + 1)
    found = diff_augment(images, torch.zeros(3), torch.rand(2, 7), prob=1.0, cutout=0.3)
    assert found.shape == images.shape
    assert found.isfinite().all()


def test_compiles_without_a_graph_break() -> None:
    flags, draws = draws_of("4.0")

    def augment(images: torch.Tensor) -> torch.Tensor:
        return diff_augment(images, flags, draws, prob=0.5, cutout=0.3)

    compiled = torch.compile(augment, fullgraph=True, backend="eager")
    assert torch.equal(compiled(CASE["in.x"]), augment(CASE["in.x"]))
