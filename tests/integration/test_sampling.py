"""`rae-xla sample` writes bit-identical images for any batch size, processes or interruption."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from sampling_world import COUNT, command, make_world, sampled_images
from tiny import environment, rae_xla, rae_xla_processes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return {"folder": folder, "config": make_world(folder)}


@pytest.fixture(scope="module")
def expected(world):
    """Return images of one uninterrupted process; all of them differ."""
    done = rae_xla(*command(world, "expected", "--batch-size", 50))
    assert done.returncode == 0, done.stderr
    images = sampled_images(world, "expected")
    assert images.shape == (COUNT, 32, 32, 3)
    assert len({image.tobytes() for image in images}) == COUNT
    return images


@pytest.mark.parametrize("batch", [1, 7])
def test_batch_size_changes_nothing(world, expected, batch):
    done = rae_xla(*command(world, f"batch-{batch}", "--batch-size", batch, "--layout", "folders"))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(sampled_images(world, f"batch-{batch}"), expected)
    assert len(list((world["folder"] / f"batch-{batch}" / "000").glob("*.png"))) == COUNT


@pytest.mark.slow
def test_two_processes(world, expected):
    done = rae_xla_processes(2, *command(world, "two", "--keep-latents"))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    assert np.array_equal(sampled_images(world, "two"), expected)
    alone = rae_xla(*command(world, "latents", "--keep-latents", "--layout", "tar"))
    assert alone.returncode == 0, alone.stderr
    assert np.array_equal(sampled_images(world, "latents"), expected)
    one, two = (np.load(world["folder"] / n / "latents.npy") for n in ("latents", "two"))
    assert np.array_equal(one, two)


@pytest.mark.slow
def test_resume_after_two_kills(world, expected):
    out = world["folder"] / "killed"
    existing = {}
    for least in (40, 120):
        process = subprocess.Popen(
            [sys.executable, "-m", "rae_xla", *map(str, command(world, "killed"))],
            env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while len(written(out)) < least and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert existing.items() <= written(out).items()
        existing = written(out)
        assert least <= len(existing) < COUNT
        assert not (out / "samples.npz").exists()
    done = rae_xla(*command(world, "killed"))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(sampled_images(world, "killed"), expected)
    assert existing.items() <= written(out).items()  # existing images were not written again
    assert not list(out.glob("*.unfinished"))


def written(out):
    """Return the names of the existing images and their modification times."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}


def test_folder_of_a_set_with_other_settings_is_refused(world, expected):
    other = rae_xla(*command(world, "expected", "--layout", "folders", "guidance.scale=2"))
    assert other.returncode == 2
    assert "other settings (guidance, layout)" in other.stderr
    assert json.loads((world["folder"] / "expected/settings.json").read_text())["layout"] == "flat"
