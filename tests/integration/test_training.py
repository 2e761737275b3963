"""Both tasks through the command line, on plain torch: train, kill, resume, invalid input."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    CLASSES,
    IMAGES,
    environment,
    make_configs,
    make_shards,
    metrics,
    rae_xla,
    same_bits,
    saved,
    train_and_kill,
)

from rae_xla.config import load_config
from rae_xla.interop.instantiate import instantiate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shards = make_shards(folder)
    return {"folder": folder, "shards": shards} | make_configs(folder, shards)


@pytest.fixture(scope="module")
def runs(world):
    """A finished run of each task."""
    for task in ("stage1", "stage2"):
        done = rae_xla(
            "train", task, "--config", world[task], "--results-dir", results(world, task)
        )
        assert done.returncode == 0, done.stderr
    return {task: results(world, task) for task in ("stage1", "stage2")}


def results(world, name):
    return world["folder"] / "results" / name


@pytest.mark.parametrize("task", ["stage1", "stage2"])
def test_a_run_writes_metrics_checkpoints_and_its_configuration(runs, world, task):
    lines = metrics(runs[task])
    assert [line["step"] for line in lines] == list(range(1, 21))
    losses = [line["train/loss"] for line in lines]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert {"opt/lr", "perf/step_time", "perf/data_wait", "train/grad_norm"} <= lines[-1].keys()
    names = [path.name for path in sorted((runs[task] / "checkpoints").iterdir())]
    assert names == ["step-00000010", "step-00000020"]
    resolved = load_config(str(runs[task] / "config.yaml"))
    assert resolved.diff(load_config(str(world[task]))) == []


def test_a_checkpoint_loads_like_a_published_file(runs, world):
    config = load_config(str(world["stage2"]))
    checkpoint = runs["stage2"] / "checkpoints/step-00000020"
    model = instantiate({"target": config.stage_2.target, "params": config.stage_2.params,
                         "ckpt": str(checkpoint)})  # fmt: skip
    ema = saved(runs["stage2"])["ema"]
    torch.testing.assert_close(dict(model.state_dict()), ema)
    autoencoder = saved(runs["stage1"])["ema"]
    stage_1 = load_config(str(world["stage1"])).stage_1
    instantiate(stage_1).load_state_dict(autoencoder)


@pytest.mark.parametrize("task", ["stage1", "stage2"])
def test_a_killed_and_resumed_run_is_bit_identical(runs, world, task):
    folder = results(world, f"killed-{task}")
    train_and_kill(task, world[task], folder)
    assert metrics(folder)[-1]["step"] < 20, "it was not killed before its end"
    done = rae_xla("train", task, "--config", world[task], "--results-dir", folder)
    assert done.returncode == 0, done.stderr
    assert "starting at step 10, resuming from" in done.stderr
    assert [line["step"] for line in metrics(folder)] == list(range(1, 21))
    same_bits(runs[task], folder)


@pytest.mark.parametrize(("task", "other"), [("stage1", "stage2"), ("stage2", "stage1")])
def test_the_configuration_of_the_other_task(world, task, other):
    folder = results(world, "mistaken")
    done = rae_xla("train", task, "--config", world[other], "--results-dir", folder)
    assert one_error(done, f"`rae-xla train {other}`")


def test_a_finished_run_is_not_changed(runs, world):
    before = (runs["stage2"] / "metrics.jsonl").read_bytes()
    again = rae_xla("train", "stage2", "--config", world["stage2"], "--results-dir", runs["stage2"])
    assert again.returncode == 0
    assert "already complete, 20 steps" in again.stderr
    assert (runs["stage2"] / "metrics.jsonl").read_bytes() == before


def test_the_decoder_of_stage_1_is_exported_for_stage_2(runs, world):
    out = world["folder"] / "decoder.pt"
    done = rae_xla("checkpoints", "export", runs["stage1"], "--what", "decoder", "--out", out)
    assert done.returncode == 0, done.stderr
    ema = saved(runs["stage1"])["ema"]
    decoder = torch.load(out, weights_only=True)
    assert decoder.keys() == {k[8:] for k in ema if k.startswith("decoder.")}
    wrong = rae_xla("checkpoints", "export", runs["stage2"], "--what", "decoder", "--out", out)
    assert wrong.returncode == 2
    assert "holds no decoder" in wrong.stderr


def test_statistics_do_not_depend_on_the_batch(world):
    files = []
    for size in (5, 48):
        out = world["folder"] / f"stat-{size}.pt"
        done = rae_xla("stats", "--config", world["stage1"], "--out", out, "--batch-size", size)
        assert done.returncode == 0, done.stderr
        files.append(torch.load(out, weights_only=True))
    torch.testing.assert_close(files[0], files[1], rtol=1e-5, atol=1e-6)
    assert files[0]["var"].shape == (32, 4, 4)
    rae = instantiate(load_config(str(world["stage1"])).stage_1).eval()
    images = all_images(world["shards"])
    latents = rae.encode(images).double()
    torch.testing.assert_close(files[0]["mean"].double(), latents.mean(0), rtol=1e-5, atol=1e-5)
    expected = latents.var(0, unbiased=False)
    torch.testing.assert_close(files[0]["var"].double(), expected, rtol=1e-4, atol=1e-6)


def all_images(shards):
    from rae_xla.data.loader import one_pass
    from rae_xla.data.shards.index import open_index
    from rae_xla.data.transforms import CenterCrop

    batch = next(one_pass(open_index(shards), batch_size=IMAGES, transform=CenterCrop(32)))
    return batch["image"].float() / 255


@pytest.mark.parametrize("mode", ["ODE", "SDE"])
def test_samples_do_not_depend_on_the_batch_and_resume(runs, world, mode):
    sets = []
    for batch in (3, 8):
        out = world["folder"] / f"samples-{mode}-{batch}"
        command = ["sample", "--config", world["stage2"], "--ckpt", runs["stage2"], "--out", out,
                   "--num-samples", 8, "--batch-size", batch, "guidance.scale=1.5",
                   f"sampler.mode={mode}"]  # fmt: skip
        done = rae_xla(*command)
        assert done.returncode == 0, done.stderr
        with np.load(out / "samples.npz") as arrays:
            sets.append(arrays["arr_0"])
            assert arrays["labels"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sets[0].shape == (8, 32, 32, 3)
    assert sets[0].dtype == np.uint8
    assert np.abs(sets[0].astype(int) - sets[1].astype(int)).max() <= 1
    assert len({image.tobytes() for image in sets[0]}) == 8
    kept, lost = out / "000001.png", out / "000006.png"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert rae_xla(*command).returncode == 0
    assert kept.stat().st_mtime_ns == before
    assert np.array_equal(np.asarray(Image.open(lost)), sets[1][6])
    other = rae_xla(*command, "--seed", 1)
    assert other.returncode == 2
    assert "other settings (seed)" in other.stderr


def test_reconstruct_a_file_and_a_folder(world, runs):
    source = world["folder"] / "images" / "nested"
    source.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(all_images(world["shards"])[:3]):
        pixels = (image * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((48, 40)).save(source / f"{i}.jpg")
    out = world["folder"] / "reconstructed"
    for given in (source.parent, source / "0.jpg"):
        done = rae_xla("reconstruct", "--config", world["stage1"], "--input", given, "--out", out)
        assert done.returncode == 0, done.stderr
        assert "mean PSNR" in done.stdout
    assert Image.open(out / "nested" / "2.png").size == (32, 32)
    assert (out / "0.png").exists()


INVALID_RUNS = [
    ("an unknown key", ["training.epoch=3"], r"training\.epoch\b.*training\.epochs"),
    ("a wrong type", ["training.steps=many"], r"training\.steps.*many"),
    ("no such shards", ["data.train=elsewhere"], "elsewhere"),
    ("a batch that cannot be divided", ["training.grad_accum_steps=3"], "does not divide"),
    ("too few classes", ["stage_2.params.num_classes=2", "misc.num_classes=2",
                         "misc.null_label=2"], r"label"),
    ("a missing weight file", ["stage_1.params.pretrained_decoder_path=no.pt"], r"no\.pt"),
    ("a wrong mesh", ["mesh.ici.fsdp=3"], "mesh.*1 devices"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "overrides", "message"), INVALID_RUNS, ids=[run[0] for run in INVALID_RUNS]
)
def test_an_invalid_run_is_one_error(world, what, overrides, message):
    folder = results(world, "invalid")
    shutil.rmtree(folder, ignore_errors=True)
    done = rae_xla(
        "train", "stage2", "--config", world["stage2"], "--results-dir", folder, *overrides
    )
    assert one_error(done, message), done.stderr


def one_error(done, message):
    lines = [line for line in done.stderr.splitlines() if "rae-xla: error:" in line]
    return (
        done.returncode == 2
        and len(lines) == 1
        and re.search(message, lines[0])
        and "Traceback" not in done.stderr
    )


def test_missing_configuration_and_checkpoint(world, tmp_path):
    done = rae_xla("train", "stage2", "--config", "nothing.yaml", "--results-dir", tmp_path)
    assert one_error(done, r"nothing\.yaml")
    command = ("sample", "--config", world["stage2"], "--out", tmp_path / "out")
    assert one_error(rae_xla(*command), "stage_2.ckpt is not set")
    assert one_error(rae_xla(*command, "--ckpt", "no.pt"), r"no\.pt")


def test_labels_out_of_range(runs, world, tmp_path):
    done = rae_xla("sample", "--config", world["stage2"], "--ckpt", runs["stage2"], "--out",
                   tmp_path / "out", "--labels", CLASSES)  # fmt: skip
    assert one_error(done, "out of range.*classes 0 to 3")


def test_a_checkpoint_of_another_model(runs, world, tmp_path):
    done = rae_xla("sample", "--config", world["stage2"], "--ckpt", runs["stage2"], "--out",
                   tmp_path / "out", "stage_2.params.hidden_size=[64,48]")  # fmt: skip
    assert one_error(done, "another shape")


def test_an_autoencoder_instead_of_a_diffusion_transformer(runs, world, tmp_path):
    done = rae_xla("sample", "--config", world["stage2"], "--ckpt", runs["stage1"], "--out",
                   tmp_path / "out")  # fmt: skip
    assert one_error(done, r"holds an autoencoder \(stage 1\): give a checkpoint of")
    done = rae_xla("generate", "--model", runs["stage1"], "--out", tmp_path / "images")
    assert one_error(done, "is a stage-1 run")


def test_a_run_has_class_names(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["stage2"], run)
    (run / "classes.json").write_text(json.dumps(["circle", "cross", "square", "star"]))
    done = rae_xla("generate", "--model", run, "--classes", "square", "--num-samples", 1,
                   "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/000-square.png").is_file()
    done = rae_xla("generate", "--model", run, "--classes", "squares", "--num-samples", 1,
                   "--out", tmp_path / "out")  # fmt: skip
    assert one_error(done, r"there is no class 'squares'; similar: square \(2\)")


def test_a_sample_set_is_not_mixed_with_generated_images(world, runs, tmp_path):
    (tmp_path / "generated.json").write_text("{}")
    done = rae_xla("sample", "--config", world["stage2"], "--ckpt", runs["stage2"], "--out",
                   tmp_path)  # fmt: skip
    assert one_error(done, "contains images of `rae-xla generate`")


def test_other_latent_statistics_than_in_training(runs, world, tmp_path):
    torch.save({"var": torch.ones(32, 4, 4)}, tmp_path / "stat.pt")
    done = rae_xla("sample", "--config", world["stage2"], "--ckpt", runs["stage2"], "--out",
                   tmp_path / "out",
                   f"stage_1.params.normalization_stat_path={tmp_path / 'stat.pt'}")  # fmt: skip
    assert one_error(done, r"created with the latent statistics .* cannot be used with")


def test_the_results_folder_of_another_run(runs, world):
    done = rae_xla("train", "stage2", "--config", world["stage2"], "--results-dir",
                   runs["stage2"], "training.optimizer.lr=1e-4")  # fmt: skip
    assert one_error(done, r"another configuration.*optimizer\.lr: 0\.002 -> 0\.0001")


@pytest.mark.parametrize(("cut", "message"), [(0, "is empty"), (700, "is truncated")])
def test_a_broken_shard_is_found_before_the_run(world, tmp_path, cut, message):
    shards = tmp_path / "shards"
    shutil.copytree(world["shards"], shards)
    first = next(shards.glob("*-000000.tar"))
    first.write_bytes(first.read_bytes()[:cut])
    done = rae_xla("train", "stage2", "--config", world["stage2"], "--results-dir",
                   tmp_path / "results", "--data", shards)  # fmt: skip
    assert one_error(done, rf"does not match its shards.*{message}")
    assert not (tmp_path / "results").exists()


def test_a_full_disk_is_one_error_and_leaves_no_partial_checkpoint(world, tmp_path):
    command = ["train", "stage2", "--config", world["stage2"], "--results-dir", tmp_path,
               "checkpoint.retry_seconds=0"]  # fmt: skip
    limited = 'ulimit -f 200; exec "$0" -m rae_xla "$@"'
    done = subprocess.run(
        ["bash", "-c", limited, sys.executable, *map(str, command)],
        capture_output=True, text=True, timeout=300, env=environment(), check=False,
    )  # fmt: skip
    assert "step 10: the checkpoint could not be written: " in done.stderr
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 21))
    assert sum(line.get("ckpt/failed", 0) for line in metrics(tmp_path)) == 3
    assert one_error(done, "checkpoint of the last step, 20, could not be written: .*its start")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_resuming_with_other_data(runs, world, tmp_path):
    other = make_shards(tmp_path)
    index = tmp_path / "shards" / "index.json"
    index.write_text(index.read_text().replace('"3"', '"three"'))
    done = rae_xla("train", "stage2", "--config", world["stage2"], "--results-dir",
                   runs["stage2"], "--data", other)  # fmt: skip
    assert one_error(done, "other training data")
