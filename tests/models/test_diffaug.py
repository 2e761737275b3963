"""DiffAugment: golden values and properties."""

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
def test_matches_golden_values(row: dict) -> None:
    flags, draws = draws_of(row["key"])
    actual = diff_augment(CASE["in.x"], flags, draws, prob=row["prob"], cutout=row["cutout"])
    torch.testing.assert_close(actual, CASE[f"out.{row['key']}"], atol=1e-6, rtol=1e-6)
    assert torch.equal(actual, CASE["in.x"]) != row["changed"]


def test_gradient() -> None:
    images = CASE["in.x"].clone().requires_grad_()
    # Recorded for the random numbers of the first row.
    actual = diff_augment(images, *draws_of("0.0"), prob=1.0, cutout=0.2)
    (actual * CASE["in.grad_weight"]).sum().backward()
    torch.testing.assert_close(images.grad, CASE["grad.x"], atol=1e-6, rtol=1e-5)


def moved(images: torch.Tensor, rows: list[int], columns: list[int]) -> torch.Tensor:
    """Translate images pixel by pixel, with zero padding."""
    out = torch.zeros_like(images)
    for sample, (down, right) in enumerate(zip(rows, columns, strict=True)):
        for h in range(HEIGHT):
            for w in range(WIDTH):
                if 0 <= h + down < HEIGHT and 0 <= w + right < WIDTH:
                    out[sample, :, h, w] = images[sample, :, h + down, w + right]
    return out


def test_all_translations_are_exact() -> None:
    images = CASE["in.x"][:1].expand(7, -1, -1, -1)
    draws = torch.full((7, 7), 0.5)
    draws[:, 0] = torch.tensor([(k % 5 + 0.5) / 5 for k in range(7)])  # 16 rows: ±2
    draws[:, 1] = torch.tensor([(k + 0.5) / 7 for k in range(7)])  # 24 columns: ±3
    actual = diff_augment(images, torch.tensor([0.0, 1.0, 1.0]), draws, prob=0.5, cutout=0.0)
    rows, columns = [k % 5 - 2 for k in range(7)], [k - 3 for k in range(7)]
    assert torch.equal(actual, moved(images, rows, columns))


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_random_numbers_at_range_limits(draw: float) -> None:
    draws = torch.full((4, 7), draw)
    actual = diff_augment(CASE["in.x"], torch.zeros(3), draws, prob=0.5, cutout=0.25)
    assert actual.isfinite().all()
    shift = [-2] * 4 if draw == 0 else [2] * 4, [-3] * 4 if draw == 0 else [3] * 4
    only_moved = diff_augment(
        CASE["in.x"], torch.tensor([0.0, 1.0, 1.0]), draws, prob=0.5, cutout=0.25
    )
    assert torch.equal(only_moved, moved(CASE["in.x"], *shift))


def test_sample_is_independent_of_batch() -> None:
    flags, draws = draws_of("0.0")
    batch = diff_augment(CASE["in.x"], flags, draws, prob=1.0, cutout=0.2)
    alone = diff_augment(CASE["in.x"][2:3], flags, draws[2:3], prob=1.0, cutout=0.2)
    torch.testing.assert_close(alone, batch[2:3], atol=1e-6, rtol=0)


def test_zero_probability_is_identity() -> None:
    flags, draws = draws_of("0.0")
    actual = diff_augment(CASE["in.x"], torch.zeros(3), draws, prob=0.0, cutout=0.2)
    assert torch.equal(actual, CASE["in.x"])
    assert diff_augment(CASE["in.x"].double(), flags, draws, prob=0.0, cutout=0.2).dtype == (
        torch.float32
    )


@pytest.mark.parametrize("size", [1, 3, 4, 56, 100])
def test_images_of_other_sizes(size: int) -> None:
    images = torch.rand(2, 3, size, size + 1)
    actual = diff_augment(images, torch.zeros(3), torch.rand(2, 7), prob=1.0, cutout=0.3)
    assert actual.shape == images.shape
    assert actual.isfinite().all()


def test_compiles_without_graph_break() -> None:
    flags, draws = draws_of("4.0")

    def augment(images: torch.Tensor) -> torch.Tensor:
        return diff_augment(images, flags, draws, prob=0.5, cutout=0.3)

    compiled = torch.compile(augment, fullgraph=True, backend="eager")
    assert torch.equal(compiled(CASE["in.x"]), augment(CASE["in.x"]))
