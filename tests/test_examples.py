"""The example scripts: the ablations whole, on little; the recipes on a tiny configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny import make_gan_config, make_shards

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "scripts" / "examples"
RECIPES = sorted(path for path in EXAMPLES.glob("stage1_*.sh"))


def run(script: str, *arguments: object, **more: str) -> subprocess.CompletedProcess:
    """A script in the environment the tests run in."""
    programs = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(programs.parent),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", EXAMPLES / script, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=800, env=environment | more, check=False,
    )  # fmt: skip


def test_there_is_a_recipe_for_every_encoder_and_size():
    names = {path.stem.removeprefix("stage1_") for path in RECIPES}
    assert {"dinov2_b", "siglip2_b", "mae_b", "dinov2_b_512", "dinov2_b_one_gpu"} == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_says_what_it_needs_and_gives(path):
    shown = run(path.name, "--help")
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert all(
        any(line.startswith(word) for line in lines) for word in ("Config", "Data", "Expect")
    )
    assert "rFID" in shown.stdout
    config = next(line.split()[1] for line in lines if line.startswith("Config"))
    assert (ROOT / config).exists()
    assert config in path.read_text().splitlines()[-1], "what it says is what it runs"


@pytest.mark.slow
def test_a_recipe_trains_exports_and_measures(tmp_path):
    """``stage1_dinov2_b.sh`` with everything replaced by tiny things."""
    shards = make_shards(tmp_path)
    tiny = yaml.safe_load(make_gan_config(tmp_path, shards).read_text())

    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict) and key != "recipe":
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}={value}".replace("'", "")

    settings = [text for text in flat(tiny) if not text.startswith("stage_1.target")]
    settings += ["training.scheduler.base_lr=1e-3", "training.steps=4", f"data.val={shards}",
                 "data.image_size=32", "gan.disc.scheduler.base_lr=1e-3",
                 f"weights.inception={tmp_path / 'none.pth'}"]  # fmt: skip
    settings = [s for s in settings if not s.split("=")[0].endswith("optimizer.lr")]
    done = run("stage1_dinov2_b.sh", *settings, OUT=str(tmp_path / "out"))
    # trained and exported; the measuring stops where there is no Inception, and says so
    assert (tmp_path / "out/checkpoints/step-00000004/manifest.json").exists(), done.stderr
    assert (tmp_path / "out/decoder.pt").exists()
    assert "weights.inception" in done.stderr


@pytest.mark.slow
def test_the_ablations_on_digits_end_with_a_table_and_a_plot(tmp_path):
    pytest.importorskip("sklearn")
    arguments = ["--digits", "--out", tmp_path, "training.steps=12", "training.log_every=3"]
    done = run("ablations.sh", *arguments)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    columns = [cell.strip() for cell in rows[0].strip("| ").split("|")]
    assert columns == ["run", "total", "L1", "LPIPS", "GAN", "D loss", "PSNR", "SSIM"]
    cells = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in rows[2:]}
    assert list(cells) == ["base", "GAN off", "tau 0", "lr half of it", "lr double", "lpips 0.5",
                           "lpips 2"]  # fmt: skip
    assert [cell.strip() for cell in cells["GAN off"][3:5]] == ["-", "-"]
    assert len({tuple(row) for row in cells.values()}) == 7, "every change changes something"
    assert (tmp_path / "table.md").read_text().strip() in done.stdout
    assert min(Image.open(tmp_path / "plot.png").size) > 200
    again = run("ablations.sh", *arguments, "tau")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("complete, 12 steps done") == 2
    assert "GAN off" not in again.stdout


def test_an_ablation_that_does_not_exist():
    done = run("ablations.sh", "--digits", "gam")
    assert done.returncode == 2
    assert "unknown: gam" in done.stderr
