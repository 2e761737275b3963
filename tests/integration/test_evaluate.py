"""``rae-xla evaluate`` from the command line, on plain torch. The networks have RANDOM weights."""

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
from rae_xla.data.shards import open_index
from rae_xla.data.stream import one_pass
from rae_xla.data.transforms import CenterCrop
from rae_xla.evaluate.image_metrics import psnr
from rae_xla.registry import instantiate
from rae_xla.sample.pictures import to_pixels, to_unit

IMAGES = 21
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
    """A short run of each stage."""
    folders = {stage: world["folder"] / "results" / stage for stage in ("stage1", "stage2")}
    for stage, folder in folders.items():
        settings = ("training.steps=4", "checkpoint.every_steps=4")
        succeed("train", stage, "--config", world[stage], "--results-dir", folder, *settings)
    return folders


@pytest.fixture(scope="module")
def truth(world):
    """The first images and their reconstructions, computed here: uint8, channels first."""
    batches = one_pass(open_index(world["shards"]), batch_size=IMAGES, transform=CenterCrop(32))
    images = next(batches)["image"]
    rae = instantiate(load_config(str(world["stage2"])).stage_1).eval()
    with torch.no_grad():
        made = to_pixels(rae(to_unit(images)), rounding=True).permute(0, 3, 1, 2)
    return images, made


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
def whole(world):
    return report(world, "whole", "--num-images", IMAGES, "--batch-size", 64)


def test_the_numbers_are_those_computed_by_hand(whole, truth):
    found = {name: entry["value"] for name, entry in whole[0]["metrics"].items()}
    assert list(found) == ["psnr", "ssim", "lpips", "rfid"]
    images, made = truth
    assert found["psnr"] == pytest.approx(psnr(images.numpy(), made.numpy()).mean(), rel=1e-12)

    # Fréchet, from torch-fidelity's own features: with fewer samples than features the trace of
    # the root is the nuclear norm of a small matrix.
    network = random_extractor()
    rows = [network(pixels)[0].double() for pixels in (images, made)]
    first, second = (r - r.mean(0) for r in rows)
    traces = (first.square().sum() + second.square().sum()) / (IMAGES - 1)
    overlap = torch.linalg.svdvals(first @ second.T).sum() / (IMAGES - 1)
    expected = (rows[0].mean(0) - rows[1].mean(0)).square().sum() + traces - 2 * overlap
    assert found["rfid"] == pytest.approx(expected.item(), rel=1e-6)


def test_the_report_says_what_was_measured(world, whole):
    found, printed = whole
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


@pytest.mark.slow
def test_the_batch_size_changes_nothing(world, whole):
    # settings after an option of many values are settings still
    options = ("--num-images", IMAGES, "--batch-size", 5)
    found, _ = report(world, "small", *options, "--metrics", "rfid", "lpips", "psnr", "ssim")
    assert found["metrics"] == whole[0]["metrics"]


@pytest.mark.slow
def test_a_reference_file(world, whole, truth):
    """The same originals as a file: the same rFID. More of them: a warning."""
    path = world["folder"] / "originals.npz"
    images = truth[0].permute(0, 2, 3, 1).numpy()
    np.savez(path, arr_0=images)
    options = ("--metrics", "rfid", "--reference", path)
    found, _ = report(world, "reference", *options, "--num-images", IMAGES)
    assert found["metrics"]["rfid"] == whole[0]["metrics"]["rfid"]
    assert found["reference"]["kind"] == "images"
    assert found["warnings"] == []
    found, printed = report(world, "fewer", *options, "--num-images", 9)
    assert found["reference"]["count"] == IMAGES
    assert f"warning: the reference has {IMAGES} images and 9 are compared" in printed
    assert len(found["warnings"]) == 1


def test_a_checkpoint_of_training(world, runs):
    values = {}
    for which in ("ema", "model"):
        options = ("--ckpt", runs["stage1"], "--weights", which, "--metrics", "psnr")
        found, _ = report(world, f"ckpt-{which}", *options)
        values[which] = found["metrics"]["psnr"]["value"]
        assert found["num_images"] == 48
        assert re.search(rf"step-00000004 \({which}\)$", found["checkpoint"])
    assert values["ema"] != values["model"]


RECON_MISUSES = [
    ("too many images", ["--num-images", 49], "49 images .* which holds 48"),
    ("no image", ["--num-images", 0], "0 images"),
    ("an unknown metric", ["--metrics", "psrn"], "--metrics psrn: .* knows psnr ssim lpips rfid"),
    ("no batch", ["--batch-size", 0, "--metrics", "psnr"], "a batch of 0"),
    ("one image", ["--num-images", 1, "--metrics", "rfid"], "rfid of a single image"),
    ("a reference for nothing", ["--metrics", "psnr", "--reference", "a.npz"], "add rfid"),
    ("no reference", ["--metrics", "rfid", "--reference", "a.npz"], "a.npz: there is no such file"),
    ("an option of the other", ["--latents", "a.npy"], "--latents belongs to .* decoders"),
    ("weights of what", ["--weights", "ema"], "give --ckpt too"),
    ("no checkpoint", ["--ckpt", "none.pt", "--metrics", "psnr"], "there is no file none.pt"),
    ("an empty folder", ["--ckpt", "EMPTY", "--metrics", "psnr"], "holds no checkpoint"),
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


def test_random_decoders_are_not_measured(world):
    command = ("evaluate", "recon", "--config", world["stage1"], "--metrics", "psnr")
    fail("no images to reconstruct", *command)
    fail("names no decoder weights", *command, "--data", world["shards"])


# ----------------------------------------------------------------------------- decoders


@pytest.fixture(scope="module")
def samples(world, runs):
    out = world["folder"] / "samples"
    succeed(*draw(world, runs, out))
    return out


def draw(world, runs, out, *options):
    return ("sample", "--config", world["stage2"], "--ckpt", runs["stage2"], "--out", out,
            "--num-samples", 12, "--batch-size", 5, "--keep-latents", *options)  # fmt: skip


@pytest.fixture(scope="module")
def other_decoder(world, runs):
    out = world["folder"] / "other.pt"
    succeed("export", "decoder", "--ckpt", runs["stage1"], "--out", out)
    return out


def decoders(world, samples, *options):
    return ("evaluate", "decoders", "--config", world["stage2"], "--latents",
            samples / "latents.npy", *options, *world["settings"])  # fmt: skip


def test_the_latents_are_those_of_the_pictures(world, samples):
    latents = np.load(samples / "latents.npy")
    assert latents.shape == (12, 32, 4, 4)
    assert latents.dtype == np.float32
    rae = instantiate(load_config(str(world["stage2"])).stage_1).eval()
    with torch.no_grad():
        pixels = to_pixels(rae.decode(torch.from_numpy(latents))).numpy()
    with np.load(samples / "samples.npz") as arrays:
        assert np.abs(pixels.astype(int) - arrays["arr_0"].astype(int)).max() <= 1


@pytest.mark.parametrize("lost", ["pictures", "latents", "half of the latents"])
def test_an_interrupted_set_is_completed(world, runs, samples, tmp_path, lost):
    out = tmp_path / "samples"
    shutil.copytree(samples, out)
    if lost == "pictures":
        # as if killed: rows of pictures that are not there yet may hold anything
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
    succeed(*draw(world, runs, out))
    assert ((out / "000003.png").stat().st_mtime_ns == kept) == (lost == "pictures")
    for name in ("latents.npy", "000009.png"):
        ours, theirs = (
            np.load(folder / name)
            if name.endswith("npy")
            else np.asarray(Image.open(folder / name))
            for folder in (out, samples)
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-5 if name.endswith("npy") else 1)


def test_sets_with_and_without_latents_do_not_mix(world, runs, samples, tmp_path):
    plain = [word for word in draw(world, runs, tmp_path / "plain") if word != "--keep-latents"]
    succeed(*plain)
    assert not (tmp_path / "plain/latents.npy").exists()
    fail(r"other settings \(keep_latents\)", *plain, "--keep-latents")
    with_latents = [samples if word == tmp_path / "plain" else word for word in plain]
    fail(r"other settings \(keep_latents\)", *with_latents)
    # a set of before there was the option goes on without it
    settings = json.loads((tmp_path / "plain/settings.json").read_text())
    del settings["keep_latents"]
    (tmp_path / "plain/settings.json").write_text(json.dumps(settings))
    succeed(*plain)


def test_decoders_of_the_same_latents(world, samples, other_decoder, tmp_path):
    """The decoder the set was drawn with gives the set back: no distance to it."""
    printed = succeed(
        *decoders(world, samples, "--reference", samples / "samples.npz", "--out", tmp_path,
                  "--decoders", DECODER, other_decoder)
    )  # fmt: skip
    found = json.loads((tmp_path / "report.json").read_text())
    same, other = found["decoders"]
    assert (same["name"], other["name"]) == ("decoder", "other")
    assert same["psnr_to_first"] == 100
    assert same["fid"] == pytest.approx(0, abs=1e-3)  # a pixel may be cut off differently
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
    checkpoint = runs["stage1"] / "checkpoints/step-00000004"
    fail(r"rae-xla export decoder --ckpt .*step-00000004 ",
         *decoders(world, samples, *free, "--decoders", DECODER, checkpoint))  # fmt: skip
    fail("given twice", *decoders(world, samples, *free, "--decoders", DECODER, DECODER))
    fail(r"no\.pt", *decoders(world, samples, *free, "--decoders", DECODER, "no.pt"))
    fail("there is no such file.*--keep-latents", *decoders(world, tmp_path, *free, *both))
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
