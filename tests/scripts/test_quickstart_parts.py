"""Tests of the scripts of the quickstart, each on little data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts" / "quickstart"

pytest.importorskip("sklearn")


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Make the scripts importable by bare name, as when they are run from their folder."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def script(name: str) -> ModuleType:
    return __import__(name)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    counts = script("digits").write(out)
    assert counts == {"train": 1437, "test": 360}
    return out


class TestDigits:
    def test_split_is_fixed_disjoint_and_stratified(self):
        split = script("digits").split()
        assert not set(split["train"]) & set(split["test"])
        # Constants, because a changed split would invalidate published numbers.
        assert split["train"].sum() == 1275762
        assert split["test"][:4].tolist() == [21, 24, 28, 34]

    def test_images_hold_the_digits(self, images):
        from sklearn.datasets import load_digits

        test, labels = script("digits").read(images / "test")
        assert test.shape == (360, 32, 32, 3)
        assert test.dtype == np.uint8
        assert np.bincount(labels).min() >= 34
        number = int(sorted((images / "test" / "7").glob("*.png"))[0].stem)
        ink = load_digits().images[number]
        # Averaging each 4x4 block undoes the enlargement, up to the bicubic overshoot it clips.
        blocks = test[labels == 7][0, ..., 0].reshape(8, 4, 8, 4).mean(axis=(1, 3)) / 255 * 16
        assert np.corrcoef(blocks.ravel(), ink.ravel())[0, 1] > 0.97

    def test_read_reports_missing_images(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"digits\.py"):
            script("digits").read(tmp_path)


class TestEncoder:
    def test_saved_encoder_is_an_ordinary_model_folder(self, images, tmp_path):
        from transformers import Dinov2WithRegistersModel

        pretrain = script("pretrain_encoder")
        pixels, labels = script("digits").read(images / "train")
        pixels = torch.from_numpy(pixels[::8]).permute(0, 3, 1, 2) / 255
        torch.manual_seed(0)
        encoder = pretrain.pretrain(pixels, torch.from_numpy(labels[::8]), steps=3, quiet=True)
        pretrain.save(encoder, tmp_path / "encoder")

        loaded = Dinov2WithRegistersModel.from_pretrained(tmp_path / "encoder").eval()
        with torch.no_grad():
            tokens = loaded((pixels[:2] - 0.5) / 0.5).last_hidden_state
            torch.testing.assert_close(tokens, encoder((pixels[:2] - 0.5) / 0.5).last_hidden_state)
        assert tokens.shape == (2, 1 + 4 + 16, 64)
        # RAE drops the affine part of the final norm, so it must be the identity.
        assert torch.equal(loaded.layernorm.weight, torch.ones(64))
        assert torch.equal(loaded.layernorm.bias, torch.zeros(64))
        processor = json.loads((tmp_path / "encoder" / "preprocessor_config.json").read_text())
        assert processor["image_mean"] == [0.5] * 3

    def test_patches_are_in_row_major_order(self):
        pixels = torch.zeros(1, 3, 32, 32)
        pixels[..., :8, 8:16] = 1
        patches = script("pretrain_encoder").patches_of(pixels)
        assert patches.shape == (1, 16, 192)
        assert patches.sum(-1).nonzero().tolist() == [[0, 1]]


class TestJudge:
    def test_frechet_distance_of_known_gaussians(self):
        judge = script("judge")
        rows = np.random.default_rng(0).normal(size=(400, 3))
        rows = (rows - rows.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T))).T
        assert judge.frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)
        # Standard normal against mean 1 and deviation 3 in each of 3 dimensions: 3 (1 + (3 - 1)^2).
        assert judge.frechet_distance(rows, 3 * rows + 1) == pytest.approx(15, rel=1e-6)

    def test_frechet_distance_with_fewer_rows_than_dimensions(self):
        judge = script("judge")
        rows = np.random.default_rng(0).normal(size=(10, 50))
        assert judge.frechet_distance(rows, rows) == pytest.approx(0, abs=1e-5)

    def test_coverage(self):
        judge = script("judge")
        real = np.arange(20.0)[:, None]
        assert judge.coverage(real, real + 0.5) == 1
        # Inner neighbourhoods reach 3 to either side, those at the ends up to 5.
        assert judge.coverage(real, np.array([[10.0]])) == pytest.approx(5 / 20)
        assert judge.coverage(real, np.array([[1000.0]])) == 0

    def test_verdicts_on_real_collapsed_and_mislabelled_digits(self, images):
        judge, read = script("judge"), script("digits").read
        train, train_labels = read(images / "train")
        test, test_labels = read(images / "test")
        evaluator = judge.Judge.learn(train, train_labels, test, test_labels)
        assert evaluator.accuracy_on_test() > 0.98

        real = evaluator.judge("test digits", test, test_labels)
        assert real.accuracy > 0.98
        assert real.frechet < 1e-6
        assert real.coverage == 1
        assert real.twins < 0.03
        assert real.copies < 0.03

        one_each = np.array([np.flatnonzero(train_labels == c)[0] for c in range(10)]).repeat(36)
        collapsed = evaluator.judge("collapsed", train[one_each], train_labels[one_each])
        assert collapsed.accuracy >= 0.9
        assert collapsed.coverage < 0.3
        assert collapsed.twins == 1
        assert collapsed.copies == 1

        wrong = evaluator.judge("mislabelled", test, (test_labels + 1) % 10)
        assert wrong.accuracy < 0.02

    def test_psnr_in_decibels(self):
        real = np.zeros((2, 4, 4, 3), np.uint8)
        off = np.stack([np.full((4, 4, 3), 1, np.uint8), np.full((4, 4, 3), 255, np.uint8)])
        assert script("judge").psnr(real, off) == pytest.approx([20 * np.log10(255), 0])

    def test_generated_digits_need_labels(self, tmp_path):
        np.savez(tmp_path / "some.npz", arr_0=np.zeros((1, 32, 32, 3), np.uint8))
        with pytest.raises(KeyError, match="labels"):
            script("judge").read_generated(tmp_path / "some.npz")


def write_results(folder: Path, images: Path) -> None:
    """Write a results folder that contains real digits instead of generated ones."""
    digits = script("digits")
    (folder / "images").symlink_to(images)
    (folder / "reconstructed").symlink_to(images / "test")
    test, labels = digits.read(images / "test")
    for name in ("plain", "guided"):
        (folder / "samples" / name).mkdir(parents=True)
        np.savez(folder / "samples" / name / "samples.npz", arr_0=test, labels=labels)
    for task in ("stage1", "stage2"):
        (folder / task).mkdir()
        rows = [{"step": s, "train/loss": 1 / (s + 1)} for s in range(30)]
        rows.insert(3, {"step": 3, "eval/psnr": 20.0})
        lines = [json.dumps(row) for row in rows]
        (folder / task / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "encoder").mkdir()
    config = {"hidden_size": 64, "image_size": 32, "patch_size": 8}
    (folder / "encoder" / "config.json").write_text(json.dumps(config))
    (folder / "times.tsv").write_text("train stage 1\t61\ntrain stage 2\t100\ntrain stage 2\t20\n")


class TestReport:
    def test_page_and_images(self, images, tmp_path, monkeypatch, capsys):
        judge, report = script("judge"), script("report")
        write_results(tmp_path, images)
        arguments = ["judge.py", "--images", str(images), "--out", str(tmp_path / "judge.json")]
        arguments += ["--reconstructed", str(tmp_path / "reconstructed")]
        for name in ("plain", "guided"):
            arguments += ["--generated", f"{name}={tmp_path / 'samples' / name / 'samples.npz'}"]
        monkeypatch.setattr(sys, "argv", arguments)
        judge.main()
        table = capsys.readouterr().out
        assert table.count("real training digits") == 2
        assert [line.split()[:2] for line in table.splitlines()[-2:]] == [
            ["plain", "360"],
            ["guided", "360"],
        ]

        page = report.write_report(tmp_path).read_text()
        assert "$" not in page
        assert "3:01 min" in page
        assert page.count("✓") == 5
        for name in ("samples_plain", "samples_guided", "reconstructions", "losses"):
            assert f'src="{name}.png"' in page
            image = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
            assert image.std() > 10
        assert Image.open(tmp_path / "samples_plain.png").height == 10 * (64 + 8) + 8

    def test_missed_goals_are_shown(self, images, tmp_path):
        write_results(tmp_path, images)
        row = {"name": "x", "count": 360, "accuracy": 0.5, "frechet": 1.0, "coverage": 0.5}
        rows = [{**row, "twins": 0.0, "copies": None}] * 3
        verdict = {"accuracy_on_test": 0.99, "psnr": 20.0, "rows": rows}
        (tmp_path / "judge.json").write_text(json.dumps(verdict))
        assert script("report").write_report(tmp_path).read_text().count("✗") == 4

    def test_losses_of_a_resumed_run_count_once(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        lines = [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 9.0}]
        lines += [{"step": 2, "train/loss": 2.0}, {"step": 3, "train/loss": 1.0}]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        steps, losses = script("page").read_losses(path)
        assert steps.tolist() == [1, 2, 3]
        assert losses.tolist() == [3.0, 2.0, 1.0]

    def test_running_mean(self):
        means = script("page").running_mean(np.array([1.0, 3.0, 5.0, 7.0]), 2)
        assert means.tolist() == [1, 2, 4, 6]


class TestConfigs:
    def test_sampling_config_matches_the_trained_model(self):
        from rae_xla import load_config

        folder = SCRIPTS.parents[1] / "configs" / "quickstart"
        trained = load_config(str(folder / "stage2.yaml"))
        sampled = load_config(str(folder / "sample.yaml"))
        for section in ("stage_1", "stage_2", "transport", "sampler", "misc"):
            assert getattr(sampled, section) == getattr(trained, section), section
        assert sampled.guidance.scale > 1

    def test_both_stages_use_the_same_autoencoder(self):
        from rae_xla import load_config

        folder = SCRIPTS.parents[1] / "configs" / "quickstart"
        one, two = (load_config(str(folder / f"stage{k}.yaml")).stage_1.params for k in (1, 2))
        later = {"noise_tau", "pretrained_decoder_path", "normalization_stat_path"}
        assert {k: v for k, v in two.items() if k not in later} == {
            k: v for k, v in one.items() if k not in later
        }


STEPS = """
set -euo pipefail
. {lib}
begin_steps .
step first one.txt bash -c 'echo run >>log; echo 1 >one.txt'
step second two bash -c 'mkdir -p two; echo part >>two/parts; echo run >>log; [[ ! -e fail ]]'
step third three.txt bash -c 'echo run >>log; echo 3 >three.txt'
sum_of_times
"""


class TestSteps:
    """Tests of scripts/quickstart/lib_steps.sh."""

    @pytest.fixture
    def run(self, tmp_path):
        def run() -> tuple[int, int]:
            """Return the exit status and the number of steps that ran."""
            (tmp_path / "log").write_text("")
            script = STEPS.format(lib=SCRIPTS / "lib_steps.sh")
            done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True)
            return done.returncode, (tmp_path / "log").read_text().count("run")

        return run

    def test_complete_steps_are_skipped(self, run):
        assert run() == (0, 3)
        assert run() == (0, 0)

    def test_interrupted_step_is_resumed(self, run, tmp_path):
        (tmp_path / "fail").touch()
        assert run() == (1, 2)
        (tmp_path / "fail").unlink()
        assert run() == (0, 2)
        assert (tmp_path / "two" / "parts").read_text() == "part\npart\n"
        times = [line.split("\t")[0] for line in (tmp_path / "times.tsv").read_text().splitlines()]
        assert times == ["first", "second", "second", "third"]

    def test_removed_result_is_recreated_with_all_later_ones(self, run, tmp_path):
        run()
        shutil.rmtree(tmp_path / "two")
        assert run() == (0, 2)
        (tmp_path / "one.txt").unlink()
        assert run() == (0, 3)
        assert (tmp_path / "two" / "parts").read_text() == "part\n"

    def test_interrupted_step_restarts_after_an_earlier_step_ran(self, run, tmp_path):
        (tmp_path / "fail").touch()
        run()
        (tmp_path / "one.txt").unlink()
        assert run() == (1, 2)
        assert (tmp_path / "two" / "parts").read_text() == "part\n"
