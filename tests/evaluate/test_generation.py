"""Metrics of generated images equal torch-fidelity's, for any batch size, devices and processes.

The networks are small stand-ins with random weights, whose features have the real names;
``test_inception`` tests Inception itself.
"""

import json

import numpy as np
import pytest
import torch
from evaluation_host import Host, on_hosts
from pod_topologies import HYBRID, OWNERS
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from rae_xla.data.shards.sources import array_source
from rae_xla.data.shards.writer import write_shards
from rae_xla.errors import UserError
from rae_xla.evaluate import references
from rae_xla.evaluate.feature_networks import FeatureModule, FeatureNetwork
from rae_xla.evaluate.generation import evaluate_generation
from rae_xla.evaluate.image_sets import open_images
from rae_xla.evaluate.references import load_generation_reference

SIDE, SIZES = 8, {"pool": 12, "spatial": 9, "logits": 20, "dino": 6}
METRICS = ("fid", "sfid", "is", "precision", "recall", "fd_dinov2")


class SmallNetwork(FeatureModule):
    """Nonlinear random features of images."""

    def __init__(self):
        super().__init__()
        self.source = "random"
        generator = torch.Generator().manual_seed(0)
        for name, size in SIZES.items():
            weight = torch.randn(size, 3 * SIDE * SIDE, generator=generator)
            self.register_buffer(name, weight)

    def forward(self, pixels):
        rows = pixels.float().flatten(1) / 255 - 0.5
        return {n: nn.functional.silu(rows @ w.T) for n, w in self.named_buffers()}


@pytest.fixture(autouse=True)
def small_moments(monkeypatch):
    """Accept reference files with the moments of the small network's features."""
    monkeypatch.setattr(references, "FEATURES", SIZES["pool"])
    monkeypatch.setattr(references, "SPATIAL_FEATURES", SIZES["spatial"])


def random_images(count, seed, brightness=256):
    shape = (count, SIDE, SIDE, 3)
    return np.random.default_rng(seed).integers(0, brightness, shape).astype(np.uint8)


SAMPLES, REFERENCE = random_images(75, 0, 240), random_images(60, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    arrays = {"a": SAMPLES, "b": random_images(75, 2, 200), "reference": REFERENCE}
    for name, images in arrays.items():
        np.savez(folder / f"{name}.npz", arr_0=images)
    return {name: folder / f"{name}.npz" for name in arrays}


def features_of(images):
    return SmallNetwork()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))


def evaluate(sets, reference_path, host=None, metrics=METRICS, batch_size=64, limit=None):
    host = host or Host()
    networks = [FeatureNetwork(SmallNetwork(), host)]
    opened = [open_images(path, limit) for path in sets]
    reference = None
    if reference_path is not None:
        reference = load_generation_reference(
            str(reference_path), SIDE, host, networks, metrics, batch_size=batch_size
        )
    return evaluate_generation(
        opened, host, networks, metrics=metrics, reference=reference, batch_size=batch_size
    )


@pytest.fixture(scope="module")
def expected_report(files):
    return evaluate([files["a"]], files["reference"])


def test_values_of_torch_fidelity(expected_report):
    samples, reference = features_of(SAMPLES), features_of(REFERENCE)
    [(_, metrics)] = expected_report.sets
    for metric, name in (("fid", "pool"), ("sfid", "spatial"), ("fd_dinov2", "dino")):
        both = [fid_features_to_statistics(rows[name].double()) for rows in (samples, reference)]
        expected = fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
        assert metrics[metric] == pytest.approx(expected, rel=1e-6)
    scores = isc_features_to_metric(samples["logits"])
    assert metrics["is_torch_fidelity"] == pytest.approx(scores["inception_score_mean"], rel=1e-6)
    coverage = calculate_precision_recall_full(samples["pool"], reference["pool"])
    assert (metrics["precision"], metrics["recall"]) == pytest.approx(coverage, rel=1e-6)
    assert 0 < metrics["recall"] < 1
    assert list(metrics) == [
        "fid", "sfid", "is", "is_torch_fidelity", "precision", "recall", "fd_dinov2",
    ]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize(("processes", "devices"), [(1, 1), (1, 4), (2, 2), (3, 6)])
def test_metrics_do_not_depend_on_batch_devices_or_processes(
    files, expected_report, batch_size, processes, devices
):
    def work(host):
        return evaluate([files["a"]], files["reference"], host, batch_size=batch_size)

    reports = on_hosts(processes, devices, work)
    [(_, metrics)] = reports[0].sets
    assert metrics == pytest.approx(expected_report.sets[0][1], rel=1e-6)
    assert all(report.describe() == reports[0].describe() for report in reports)


@pytest.mark.parametrize(
    "owners", [OWNERS["v5e:4x4"], HYBRID, (1, 0, 1, 0)], ids=["v5e:4x4", "hybrid", "alternating"]
)
def test_metrics_do_not_depend_on_the_order_of_the_devices(files, expected_report, owners):
    """The rows of a process are not consecutive on the devices of a pod."""

    def work(host):
        return evaluate([files["a"]], files["reference"], host)

    reports = on_hosts(max(owners) + 1, len(owners), work, owners)
    assert reports[0].sets[0][1] == pytest.approx(expected_report.sets[0][1], rel=1e-6)
    assert all(report.describe() == reports[0].describe() for report in reports)


def test_several_sets_give_mean_and_spread(files, expected_report):
    report = evaluate([files["a"], files["b"]], files["reference"], metrics=("fid", "is"))
    one, other = (metrics["fid"] for _, metrics in report.sets)
    assert one == expected_report.sets[0][1]["fid"]
    assert other > one
    content = json.loads(json.dumps(report.describe()))
    assert content["metrics"]["fid"] == {
        "value": pytest.approx((one + other) / 2),
        "spread": pytest.approx((other - one) / 2**0.5),
        "unit": None,
        "images": 75,
    }
    assert [each["path"] for each in content["sets"]] == [str(files["a"]), str(files["b"])]
    assert content["reference"]["count"] == 60
    assert "the reference has 60 images and 75" in content["warnings"][0]
    assert expected_report.describe()["metrics"]["fid"]["spread"] is None


def test_limited_number_of_images(files, expected_report):
    report = evaluate([files["a"]], files["reference"], limit=60)
    assert (report.num_images, report.warnings) == (60, ())
    assert report.sets[0][1]["fid"] != expected_report.sets[0][1]["fid"]


def moments(spatial=True):
    """Return moments as the ADM suite saves them."""
    features = features_of(REFERENCE)
    arrays = {}
    for name, ending in (("pool", ""), ("spatial", "_s")):
        if spatial or not ending:
            rows = features[name].double().numpy()
            arrays |= {f"mu{ending}": rows.mean(0), f"sigma{ending}": np.cov(rows, rowvar=False)}
    return arrays


def test_reference_of_the_adm_suite(files, expected_report, tmp_path):
    """It has moments of all images, and a subset of them for the other metrics."""
    np.savez(tmp_path / "adm.npz", arr_0=REFERENCE[:40], **moments())
    report = evaluate([files["a"]], tmp_path / "adm.npz")
    [(_, metrics)] = report.sets
    for metric in ("fid", "sfid", "is"):
        assert metrics[metric] == pytest.approx(expected_report.sets[0][1][metric], rel=1e-6)
    reference = features_of(REFERENCE[:40])["pool"]
    expected = calculate_precision_recall_full(features_of(SAMPLES)["pool"], reference)
    assert (metrics["precision"], metrics["recall"]) == pytest.approx(expected, rel=1e-6)
    assert report.left_out == {}
    assert "50,000" in report.warnings[0]
    assert "75 samples with 40 images" in report.warnings[1]
    assert report.reference.describe()["kind"] == "moments"
    assert report.reference.describe()["images"] == 40


def test_reference_of_moments_leaves_metrics_out(files, expected_report, tmp_path):
    np.savez(tmp_path / "moments.npz", **moments())
    report = evaluate([files["a"]], tmp_path / "moments.npz")
    assert report.metric_names == ("fid", "sfid", "is", "is_torch_fidelity")
    assert report.mean("sfid") == pytest.approx(expected_report.mean("sfid"), rel=1e-6)
    assert list(report.left_out) == ["precision", "recall", "fd_dinov2"]
    assert "precision needs images" in report.left_out["precision"]
    np.savez(tmp_path / "mu.npz", arr_0=REFERENCE, **moments(spatial=False))
    report = evaluate([files["a"]], tmp_path / "mu.npz")
    assert list(report.left_out) == ["sfid"]
    assert "no mu_s and sigma_s" in report.left_out["sfid"]
    with pytest.raises(UserError, match=r"recall needs images"):
        evaluate([files["a"]], tmp_path / "moments.npz", metrics=("recall",))


def test_reference_of_shards(files, expected_report, tmp_path):
    source = array_source(REFERENCE, np.zeros(len(REFERENCE), np.int64))
    write_shards(source, str(tmp_path / "shards"))
    report = evaluate([files["a"]], tmp_path / "shards")
    assert report.sets[0][1] == pytest.approx(expected_report.sets[0][1], rel=1e-6)
    assert report.reference.kind == "originals"
    assert report.reference.count == 60


def test_inception_score_needs_no_reference(files, expected_report):
    report = evaluate([files["a"]], None, metrics=("is",))
    assert report.mean("is") == expected_report.mean("is")
    assert report.describe()["reference"] is None


@pytest.mark.parametrize(
    ("sets", "metrics", "limit", "message"),
    [
        (["a"], ("fid",), 1, r"fid of 1 images \(.*a\.npz\): at least 2"),
        (["a"], ("recall",), 3, "recall of 3 images .*at least 4"),
        (["a", "reference"], ("fid",), None, r"a\.npz has 75 .*reference\.npz has 60 of 8"),
    ],
)
def test_sets_that_cannot_be_measured(files, sets, metrics, limit, message):
    with pytest.raises(UserError, match=message):
        evaluate([files[name] for name in sets], files["reference"], None, metrics, limit=limit)


def test_features_that_are_not_finite(files):
    host, network = Host(), SmallNetwork()
    network.pool[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"a\.npz: .*not finite"):
        evaluate_generation(
            [open_images(files["a"])],
            host,
            [FeatureNetwork(network, host)],
            metrics=("fid",),
            reference=load_generation_reference(
                str(files["reference"]),
                SIDE,
                host,
                [FeatureNetwork(SmallNetwork(), host)],
                ("fid",),
            ),
        )


def test_reference_images_of_another_size(files, tmp_path):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((5, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match=r"large\.npz: its images are 16 x 16 .* 8 x 8"):
        evaluate([files["a"]], tmp_path / "large.npz")
