"""The same 200 pictures, to the bit, however they are drawn."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from sampling_world import COUNT, command, make_world, pictures
from tiny import environment, rae_xla, rae_xla_processes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return {"folder": folder, "config": make_world(folder)}


@pytest.fixture(scope="module")
def whole(world):
    """Drawn at once; no two are alike."""
    done = rae_xla(*command(world, "whole", "--batch-size", 50))
    assert done.returncode == 0, done.stderr
    made = pictures(world, "whole")
    assert made.shape == (COUNT, 32, 32, 3)
    assert len({picture.tobytes() for picture in made}) == COUNT
    return made


@pytest.mark.parametrize("batch", [1, 7])
def test_at_any_batch_size(world, whole, batch):
    done = rae_xla(*command(world, f"batch-{batch}", "--batch-size", batch, "--layout", "folders"))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pictures(world, f"batch-{batch}"), whole)
    assert len(list((world["folder"] / f"batch-{batch}" / "000").glob("*.png"))) == COUNT


@pytest.mark.slow
def test_by_two_processes_each_with_its_share(world, whole):
    done = rae_xla_processes(2, *command(world, "two", "--keep-latents"))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    assert np.array_equal(pictures(world, "two"), whole)
    alone = rae_xla(*command(world, "latents", "--keep-latents", "--layout", "tar"))
    assert alone.returncode == 0, alone.stderr
    assert np.array_equal(pictures(world, "latents"), whole)
    ours, theirs = (np.load(world["folder"] / n / "latents.npy") for n in ("latents", "two"))
    assert np.array_equal(ours, theirs)


@pytest.mark.slow
def test_killed_twice_on_the_way(world, whole):
    out = world["folder"] / "killed"
    there = {}
    for least in (40, 120):
        process = subprocess.Popen(
            [sys.executable, "-m", "rae_xla", *map(str, command(world, "killed"))],
            env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while len(written(out)) < least and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert there.items() <= written(out).items()
        there = written(out)
        assert least <= len(there) < COUNT
        assert not (out / "samples.npz").exists()
    done = rae_xla(*command(world, "killed"))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pictures(world, "killed"), whole)
    assert there.items() <= written(out).items()  # what was there was not written again
    assert not list(out.glob("*.unfinished"))


def written(out):
    """The pictures that are there, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}


def test_a_folder_with_pictures_of_other_settings_is_refused(world, whole):
    other = rae_xla(*command(world, "whole", "--layout", "folders", "guidance.scale=2"))
    assert other.returncode == 2
    assert "other settings (guidance, layout)" in other.stderr
    assert json.loads((world["folder"] / "whole/settings.json").read_text())["layout"] == "flat"
