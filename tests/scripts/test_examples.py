"""Tests of the example scripts with SMOKE=1, which replaces data and weights by tiny stand-ins."""

from __future__ import annotations

import json
import os
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "scripts" / "examples"
RECIPES = sorted(EXAMPLES.glob("stage1_*.sh"))
DIFFUSION = sorted(EXAMPLES.glob("stage2_*.sh"))
# Their configurations are the bases of those of stage1_dinov3_l_one_gpu and stage2_raev2_s.
BASES = ("stage1_dinov3_l", "stage2_raev2_xl")
ALL = sorted({*EXAMPLES.glob("*.sh")} - {EXAMPLES / "lib_examples.sh"})

# `rae-xla` for the scripts: a client of tiny.rae_xla, which has imported everything already.
CLIENT = f"""#!{sys.executable} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["RAE_XLA_SERVER"])
with server.makefile("rw") as stream:
    print(json.dumps([os.getcwd(), *sys.argv[1:]]), file=stream, flush=True)
    code, out, err = json.loads(stream.readline())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        folder, *arguments = json.loads(self.rfile.readline())
        assert folder == str(ROOT)
        done = tiny.rae_xla(*arguments)
        self.wfile.write((json.dumps([done.returncode, done.stdout, done.stderr]) + "\n").encode())


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Return environment variables that put this `rae-xla` first on PATH."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "rae-xla").write_text(CLIENT)
    (folder / "rae-xla").chmod(0o755)
    with socketserver.UnixStreamServer(str(folder / "socket"), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
               "RAE_XLA_SERVER": str(folder / "socket")}  # fmt: skip
        server.shutdown()


def smoked(paths: list[Path]) -> list:
    """Return the scripts as parameters; those of base configurations run in nightly tests."""
    marks = {path: [pytest.mark.nightly] if path.stem in BASES else [] for path in paths}
    return [pytest.param(path, marks=marks[path], id=path.stem) for path in paths]


def run(script: str, *arguments: object, **more: str) -> subprocess.CompletedProcess:
    """Run a script in the environment of the tests, without a bucket."""
    bin_folder = Path(sys.executable).parent
    environment = {k: v for k, v in os.environ.items() if k != "BUCKET"} | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(bin_folder.parent),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", EXAMPLES / script, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=800, env=environment | more, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def smoke(programs, tmp_path_factory):
    """Return a function that runs a script with SMOKE=1 and returns its output."""
    made = tmp_path_factory.mktemp("smoke")

    def run_it(script: str, out: Path, *arguments: object, **more: str) -> str:
        done = run(script, *arguments, SMOKE="1", SMOKE_DIR=str(made), OUT=str(out),
                   BUCKET="is-not-used", **programs, **more)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run_it


def test_examples_exist_and_are_short():
    names = {path.stem for path in ALL}
    assert {"stage1_dinov2_b", "stage2_ditdh_s", "stage2_ditdh_xl", "stage2_ditdh_xl_512",
            "stage2_ditdh_xl_multislice", "stats", "sample_tpu", "sample_gpu", "evaluate_gpu",
            "ablations"} <= names  # fmt: skip
    assert all(path.read_text().count("\n") < 40 for path in ALL if path.stem != "ablations")


def test_every_encoder_and_size_has_a_recipe():
    names = {path.stem.removeprefix("stage1_") for path in RECIPES}
    assert names == {
        "dinov2_b", "siglip2_b", "mae_b", "dinov2_b_512", "dinov2_b_one_gpu", "dinov3_l",
        "dinov3_l_one_gpu",
    }  # fmt: skip


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_help_lists_config_expectations_and_results(path):
    shown = run(path.name, "--help")
    assert shown.returncode == 0
    if path.stem == "ablations":
        assert shown.stdout.startswith("usage: ")
        return
    lines = shown.stdout.splitlines()
    assert all(any(line.startswith(word) for line in lines) for word in ("Expect", "Results"))
    assert ("rFID" if path in RECIPES else "Expect") in shown.stdout
    for line in lines:
        if line.startswith("Config"):
            config = line.split()[1].rstrip(",")
            assert (ROOT / config).exists()
            assert config in path.read_text().partition("lib_examples.sh")[2]


def test_bucket_holds_data_and_checkpoints(tmp_path):
    """A stub records the commands that a script runs on a TPU VM."""
    for name in ("rae-xla", "hf"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n')
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for script in ("stage1_dinov2_b.sh", "stage2_ditdh_xl_multislice.sh"):
        done = run(script, "training.epochs=2", BUCKET="b", PATH=path, OUT="o", SLICES="4")
        assert done.returncode == 0, done.stderr
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if "rae-xla" in line]
    data = "data.train=gs://b/shards/imagenet-train data.val=gs://b/shards/imagenet-val"
    decoder, diffusion = (
        f"gs://b/runs/{n}" for n in ("stage1_dinov2_b", "stage2_ditdh_xl_multislice")
    )
    own = "training.epochs=2"
    one, two = "configs/stage1/dinov2_b_256.yaml", "configs/stage2/ditdh_xl_256.yaml"
    assert calls == [
        f"rae-xla train stage1 --config {one} --results-dir o {data} "
        f"checkpoint.dir={decoder} {own}",
        f"rae-xla checkpoints export {decoder} --what decoder --out o/decoder.pt",
        f"rae-xla evaluate recon --config {one} --ckpt {decoder} --out o/recon.json --metrics psnr "
        f"ssim lpips rfid {data} checkpoint.dir={decoder} {own} runtime.precision=fp32",
        f"rae-xla train stage2 --config {two} --results-dir o runtime.precision=bf16 "
        f"mesh.dcn.data=4 {data} checkpoint.dir={diffusion} {own}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", smoked(RECIPES))
def test_decoder_is_trained_exported_and_evaluated(path, smoke, tmp_path):
    smoke(path.name, tmp_path)
    assert (tmp_path / "checkpoints/step-00000002/manifest.json").exists()
    assert (tmp_path / "decoder.pt").exists()
    measured = json.loads((tmp_path / "recon.json").read_text())["metrics"]
    assert {"psnr", "ssim"} == set(measured)


@pytest.mark.slow
@pytest.mark.parametrize("path", smoked(DIFFUSION))
def test_diffusion_model_is_trained_and_resumed(path, smoke, tmp_path):
    smoke(path.name, tmp_path)
    assert (tmp_path / "checkpoints/step-00000002/manifest.json").exists()
    if path.stem == "stage2_ditdh_s":
        assert "already complete, 2 steps" in smoke(path.name, tmp_path)


@pytest.mark.slow
def test_text_to_image_model_is_trained_tuned_and_sampled(smoke, tmp_path):
    smoke("t2i_pretrain.sh", tmp_path / "first")
    smoke("t2i_finetune.sh", tmp_path / "second", FROM=str(tmp_path / "first"))
    assert (tmp_path / "second/model/config.json").exists()
    smoke("t2i_one_gpu.sh", tmp_path / "one")
    assert len(list((tmp_path / "one/images").glob("*-a-*.png"))) == 4


@pytest.mark.slow
def test_text_to_image_model_of_raev2_is_trained_resumed_and_sampled(smoke, tmp_path):
    smoke("t2i_raev2.sh", tmp_path)
    assert len(list((tmp_path / "images").glob("*-a-*.png"))) == 4
    assert "already complete, 2 steps" in smoke("t2i_raev2.sh", tmp_path)


@pytest.mark.slow
def test_sampling(smoke, tmp_path):
    smoke("sample_tpu.sh", tmp_path)
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (8, 32, 32, 3)


@pytest.mark.slow
def test_statistics(smoke, tmp_path):
    smoke("stats.sh", tmp_path)
    assert (tmp_path / "stat.pt").exists()


@pytest.mark.slow
def test_sampling_and_evaluation_under_torchrun(smoke, tmp_path):
    """On all GPUs, or in one CPU process without a GPU."""
    samples, out = tmp_path / "samples", tmp_path / "measured"
    smoke("sample_gpu.sh", samples, "runtime.precision=fp32")
    assert np.load(samples / "samples.npz")["arr_0"].shape == (8, 32, 32, 3)
    smoke("evaluate_gpu.sh", out, SAMPLES=str(samples))
    assert "fd_dinov2" in (out / "gen.json").read_text()


@pytest.mark.slow
def test_ablations_write_a_table_and_a_plot(smoke, tmp_path):
    output = smoke("ablations.sh", tmp_path, "--out", tmp_path)
    rows = [line for line in output.splitlines() if line.startswith("| ")]
    columns = [cell.strip() for cell in rows[0].strip("| ").split("|")]
    assert columns == ["run", "total", "L1", "LPIPS", "GAN", "D loss", "PSNR", "SSIM"]
    cells = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in rows[2:]}
    assert list(cells) == ["base", "GAN off", "tau 0", "lr half of it", "lr double", "lpips 0.5",
                           "lpips 2"]  # fmt: skip
    assert [cell.strip() for cell in cells["GAN off"][3:5]] == ["-", "-"]
    assert len({tuple(row) for row in cells.values()}) == 7, "every change changes something"
    assert (tmp_path / "table.md").read_text().strip() in output
    assert min(Image.open(tmp_path / "plot.png").size) > 200
    again = smoke("ablations.sh", tmp_path, "--out", tmp_path, "tau")
    assert again.count("already complete, 2 steps") == 2
    assert "GAN off" not in again


def test_unknown_ablation_is_rejected():
    done = run("ablations.sh", "--digits", "gam")
    assert done.returncode == 2
    assert "unknown argument: gam" in done.stderr
