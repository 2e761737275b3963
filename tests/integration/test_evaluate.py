"""``rae-xla evaluate recon`` and ``decoders`` on the torch backend, with RANDOM networks."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from golden_case import GOLDEN
from PIL import Image
from random_loss_networks import write_vgg16
from random_networks import random_extractor, write_inception
from tiny import make_configs, make_shards, rae_xla

from rae_xla.config import load_config
from rae_xla.data.loader import one_pass
from rae_xla.data.shards.index import open_index
from rae_xla.data.transforms import CenterCrop
from rae_xla.evaluate.image_metrics import psnr
from rae_xla.interop.instantiate import instantiate
from rae_xla.sample.images import to_pixels, to_unit

IMAGES = 7
DECODER = GOLDEN / "rae/dinov2/decoder.pt"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shards = make_shards(folder)
    weights = {
        "inception": write_inception(folder / "inception.pth"),
        "vgg16": write_vgg16(folder / "vgg16.pth"),
    }
    settings = [f"weights.{name}={path}" for name, path in weights.items()]
    return {"folder": folder, "shards": shards, "settings": settings} | make_configs(folder, shards)


@pytest.fixture(scope="module")
def runs(world):
    """Return the results folders of a short run of each stage."""
    folders = {task: world["folder"] / "results" / task for task in ("stage1", "stage2")}
    for task, folder in folders.items():
        settings = ("training.steps=4", "checkpoint.every_steps=4")
        succeed("train", task, "--config", world[task], "--results-dir", folder, *settings)
    return folders


@pytest.fixture(scope="module")
def image_pairs(world):
    """Return the first images and their reconstructions, (N, 3, 32, 32) uint8."""
    batches = one_pass(open_index(world["shards"]), batch_size=IMAGES, transform=CenterCrop(32))
    images = next(batches)["image"]
    rae = instantiate(load_config(str(world["stage2"])).stage_1).eval()
    with torch.no_grad():
        results = to_pixels(rae(to_unit(images)), rounding=True).permute(0, 3, 1, 2)
    return images, results


def succeed(*command):
    done = rae_xla(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fail(message, *command):
    done = rae_xla(*command)
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "rae-xla: error:" in line]
    assert re.search(message, line), line
    assert "Traceback" not in done.stderr


def recon(world, *options):
    return ("evaluate", "recon", "--config", world["stage2"], "--data", world["shards"],
            *options, *world["settings"])  # fmt: skip


def report(world, name, *options):
    out = world["folder"] / f"{name}.json"
    printed = succeed(*recon(world, "--out", out, *options))
    return json.loads(out.read_text()), printed


@pytest.fixture(scope="module")
def expected(world):
    return report(world, "expected", "--num-images", IMAGES, "--batch-size", 64)


def test_values_equal_an_independent_computation(expected, image_pairs):
    values = {name: entry["value"] for name, entry in expected[0]["metrics"].items()}
    assert list(values) == ["psnr", "ssim", "lpips", "rfid"]
    images, results = image_pairs
    ratio = psnr(images.numpy(), results.numpy()).mean()
    assert values["psnr"] == pytest.approx(ratio, rel=1e-12)

    # Fréchet distance of torch-fidelity's features: with fewer samples than features, the trace of
    # the matrix root is the nuclear norm of a small matrix.
    network = random_extractor()
    rows = [network(pixels)[0].double() for pixels in (images, results)]
    first, second = (r - r.mean(0) for r in rows)
    traces = (first.square().sum() + second.square().sum()) / (IMAGES - 1)
    overlap = torch.linalg.svdvals(first @ second.T).sum() / (IMAGES - 1)
    distance = (rows[0].mean(0) - rows[1].mean(0)).square().sum() + traces - 2 * overlap
    assert values["rfid"] == pytest.approx(distance.item(), rel=1e-6)


def test_report_and_table(world, expected):
    found, printed = expected
    index = open_index(world["shards"])
    assert found["num_images"] == IMAGES
    assert {entry["images"] for entry in found["metrics"].values()} == {IMAGES}
    assert found["metrics"]["psnr"]["unit"] == "dB"
    assert found["reference"]["kind"] == "originals"
    assert found["reference"]["path"] == index.folder
    assert found["reference"]["count"] == IMAGES
    assert len(found["reference"]["sha256"]) == 12
    assert found["warnings"] == []
    assert found["checkpoint"] == str(DECODER)
    assert found["weights"]["inception"].endswith("inception.pth")
    assert found["weights"]["vgg16"].endswith("vgg16.pth")
    assert found["config"] == str(world["stage2"])
    assert found["versions"]["rae_xla"]
    for name, entry in found["metrics"].items():
        assert f"{name:<6} {entry['value']:12.6f}" in printed
    assert f"rfid against the {IMAGES} originals" in printed


@pytest.mark.nightly  # by default only on XLA: test_evaluate_xla.py
def test_batch_size_changes_nothing(world, expected):
    # settings may follow an option with several values
    options = ("--num-images", IMAGES, "--batch-size", 5)
    found, _ = report(world, "small", *options, "--metrics", "rfid", "lpips", "psnr", "ssim")
    assert found["metrics"] == expected[0]["metrics"]


@pytest.mark.slow
def test_reference_file(world, expected, image_pairs):
    """The originals as a file give the same rFID; another number of them gives a warning."""
    path = world["folder"] / "originals.npz"
    images = image_pairs[0].permute(0, 2, 3, 1).numpy()
    np.savez(path, arr_0=images)
    options = ("--metrics", "rfid", "--reference", path)
    found, _ = report(world, "reference", *options, "--num-images", IMAGES)
    assert found["metrics"]["rfid"] == expected[0]["metrics"]["rfid"]
    assert found["reference"]["kind"] == "images"
    assert found["warnings"] == []
    found, printed = report(world, "fewer", *options, "--num-images", 3)
    assert found["reference"]["count"] == IMAGES
    assert f"warning: the reference has {IMAGES} images and 3" in printed
    assert len(found["warnings"]) == 1


def test_training_checkpoint(world, runs):
    values = {}
    for which in ("ema", "model"):
        options = ("--ckpt", runs["stage1"], "--weights", which, "--metrics", "psnr")
        found, _ = report(world, f"ckpt-{which}", *options)
        values[which] = found["metrics"]["psnr"]["value"]
        assert found["num_images"] == 48
        assert re.search(rf"step-00000004 \({which}\)$", found["checkpoint"])
    assert values["ema"] != values["model"]


RECON_MISUSES = [
    ("too many images", ["--num-images", 49], "49 images .* which has 48"),
    ("no image", ["--num-images", 0], "--num-images 0: expected"),
    ("an unknown metric", ["--metrics", "psrn"], "--metrics psrn: .* psnr ssim lpips rfid"),
    ("no batch", ["--batch-size", 0, "--metrics", "psnr"], "--batch-size 0: expected"),
    ("one image", ["--num-images", 1, "--metrics", "rfid"], "rfid of a single image"),
    ("a reference for nothing", ["--metrics", "psnr", "--reference", "a.npz"], "add rfid"),
    ("no reference", ["--metrics", "rfid", "--reference", "a.npz"], "a.npz"),
    ("an option of the other", ["--latents", "a.npy"], "--latents applies to .* decoders"),
    ("weights of what", ["--weights", "ema"], "give --ckpt too"),
    ("no checkpoint", ["--ckpt", "none.pt", "--metrics", "psnr"], "none.pt"),
    ("an empty folder", ["--ckpt", "EMPTY", "--metrics", "psnr"], "checkpoint"),
    ("no shards", ["--data", "nowhere"], "nowhere"),
    ("no Inception", ["weights.inception=none.pth", "--metrics", "rfid"], "none.pth"),
    ("no VGG", ["weights.vgg16=none.pth", "--metrics", "lpips"], "none.pth.*--metrics psnr"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "options", "message"), RECON_MISUSES, ids=[m[0] for m in RECON_MISUSES]
)
def test_misuse_of_recon(world, tmp_path, what, options, message):
    options = [tmp_path if option == "EMPTY" else option for option in options]
    # the settings of the case come last, so they count
    fail(message, *recon(world), *options)


def test_random_decoders_are_refused(world):
    command = ("evaluate", "recon", "--config", world["stage1"], "--metrics", "psnr")
    fail("no images to reconstruct", *command)
    fail("names no decoder weights", *command, "--data", world["shards"])


# ----------------------------------------------------------------------------- decoders


@pytest.fixture(scope="module")
def samples(world, runs):
    out = world["folder"] / "samples"
    succeed(*sample_command(world, runs, out))
    return out


def sample_command(world, runs, out, *options):
    return ("sample", "--config", world["stage2"], "--ckpt", runs["stage2"], "--out", out,
            "--num-samples", 12, "--batch-size", 5, "--keep-latents", *options)  # fmt: skip


@pytest.fixture(scope="module")
def other_decoder(world, runs):
    out = world["folder"] / "other.pt"
    succeed("checkpoints", "export", runs["stage1"], "--what", "decoder", "--out", out)
    return out


def decoders(world, samples, *options):
    return ("evaluate", "decoders", "--config", world["stage2"], "--latents",
            samples / "latents.npy", *options, *world["settings"])  # fmt: skip


def test_latents_decode_to_the_images(world, samples):
    latents = np.load(samples / "latents.npy")
    assert latents.shape == (12, 32, 4, 4)
    assert latents.dtype == np.float32
    rae = instantiate(load_config(str(world["stage2"])).stage_1).eval()
    with torch.no_grad():
        pixels = to_pixels(rae.decode(torch.from_numpy(latents))).numpy()
    with np.load(samples / "samples.npz") as arrays:
        assert np.abs(pixels.astype(int) - arrays["arr_0"].astype(int)).max() <= 1


@pytest.mark.parametrize("lost", ["images", "latents", "half of the latents"])
def test_interrupted_set_is_completed(world, runs, samples, tmp_path, lost):
    out = tmp_path / "samples"
    shutil.copytree(samples, out)
    if lost == "images":
        # as if killed: rows of missing images may have any content
        for number in range(7, 12):
            (out / f"{number:06d}.png").unlink()
        found = np.load(out / "latents.npy", mmap_mode="r+")
        found[7:] = 0
        found.flush()
        del found
    elif lost == "latents":
        (out / "latents.npy").unlink()
    else:
        content = (out / "latents.npy").read_bytes()
        (out / "latents.npy").write_bytes(content[: len(content) // 2])
    kept = (out / "000003.png").stat().st_mtime_ns
    succeed(*sample_command(world, runs, out))
    assert ((out / "000003.png").stat().st_mtime_ns == kept) == (lost == "images")
    for name in ("latents.npy", "000009.png"):
        completed, original = (
            np.load(folder / name)
            if name.endswith("npy")
            else np.asarray(Image.open(folder / name))
            for folder in (out, samples)
        )
        np.testing.assert_allclose(completed, original, atol=1e-5 if name.endswith("npy") else 1)


def test_sets_with_and_without_latents_do_not_mix(world, runs, samples, tmp_path):
    command = sample_command(world, runs, tmp_path / "plain")
    plain = [argument for argument in command if argument != "--keep-latents"]
    succeed(*plain)
    assert not (tmp_path / "plain/latents.npy").exists()
    fail(r"other settings \(keep_latents\)", *plain, "--keep-latents")
    with_latents = [samples if each == tmp_path / "plain" else each for each in plain]
    fail(r"other settings \(keep_latents\)", *with_latents)
    # a set that was written before the option existed resumes without it
    settings = json.loads((tmp_path / "plain/settings.json").read_text())
    del settings["keep_latents"]
    (tmp_path / "plain/settings.json").write_text(json.dumps(settings))
    succeed(*plain)


def test_compare_decoders(world, samples, other_decoder, tmp_path):
    """The decoder that the set was sampled with has distance zero to the set."""
    printed = succeed(
        *decoders(world, samples, "--reference", samples / "samples.npz", "--out", tmp_path,
                  "--decoders", DECODER, other_decoder)
    )  # fmt: skip
    found = json.loads((tmp_path / "report.json").read_text())
    same, other = found["decoders"]
    assert (same["name"], other["name"]) == ("decoder", "other")
    assert same["psnr_to_first"] == 100
    assert same["fid"] == pytest.approx(0, abs=1e-3)  # a pixel may be truncated differently
    assert other["fid"] > 0.1
    assert other["psnr_to_first"] < 40
    assert found["num_images"] == found["reference"]["count"] == 12
    assert f"{other['fid']:.6f}" in printed
    assert "fid against 12 images in" in printed
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (8 * len("decoder") + 10 * 34 + 2, 2 * 34 + 2)


def test_misuse_of_decoders(world, runs, samples, other_decoder, tmp_path):
    both = ("--decoders", DECODER, other_decoder)
    fail("fid needs --reference", *decoders(world, samples, *both))
    fail("needs --decoders", *decoders(world, samples))
    free = ("--metrics", "psnr")
    checkpoint = runs["stage1"] / "checkpoints/step-00000004"  # its averaged decoder
    printed = succeed(*decoders(world, samples, *free, "--decoders", DECODER, checkpoint))
    assert "step-00000004" in printed
    fail("given twice", *decoders(world, samples, *free, "--decoders", DECODER, DECODER))
    fail(r"no\.pt", *decoders(world, samples, *free, "--decoders", DECODER, "no.pt"))
    fail("latents.npy.*--keep-latents", *decoders(world, tmp_path, *free, *both))
    for name, latents, message in [
        ("shape", np.ones((3, 8, 4, 4), np.float32), r"float32 \(3, 8, 4, 4\).*\(N, 32, 4, 4\)"),
        ("type", np.ones((3, 32, 4, 4)), "float64"),
        ("gap", np.stack([np.ones((32, 4, 4)), np.zeros((32, 4, 4))]).astype(np.float32),
         "row 1 of 2 was never written"),
    ]:  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        np.save(folder / "latents.npy", latents)
        fail(message, *decoders(world, folder, *free, *both))
