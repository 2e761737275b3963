"""What samples are worth: torch-fidelity's numbers, whatever the batch, the devices, the processes.

The networks here are small stand-ins with random weights, whose features have the real names: what
Inception itself makes of pictures is in ``test_inception``.
"""

import json

import numpy as np
import pytest
import torch
from evaluation_host import Host, on_hosts
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from rae_xla.data.shards import write_shards
from rae_xla.data.sources import array_source
from rae_xla.errors import UserError
from rae_xla.evaluate import reference
from rae_xla.evaluate.gen_reference import load_gen_reference
from rae_xla.evaluate.generation import evaluate_generation
from rae_xla.evaluate.inception import FeatureModule, FeatureNetwork
from rae_xla.evaluate.picture_sets import open_pictures

SIDE, SIZES = 8, {"pool": 12, "spatial": 9, "logits": 20, "dino": 6}
METRICS = ("fid", "sfid", "is", "precision", "recall", "fd_dinov2")


class Small(FeatureModule):
    """Two layers: features that depend on the pictures, and not linearly."""

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
    """Reference files with the moments of the small network's features are welcome."""
    monkeypatch.setattr(reference, "FEATURES", SIZES["pool"])
    monkeypatch.setattr(reference, "SPATIAL_FEATURES", SIZES["spatial"])


def draw(count, seed, brightness=256):
    shape = (count, SIDE, SIDE, 3)
    return np.random.default_rng(seed).integers(0, brightness, shape).astype(np.uint8)


SAMPLES, REFERENCE = draw(75, 0, 240), draw(60, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    arrays = {"a": SAMPLES, "b": draw(75, 2, 200), "reference": REFERENCE}
    for name, images in arrays.items():
        np.savez(folder / f"{name}.npz", arr_0=images)
    return {name: folder / f"{name}.npz" for name in arrays}


def features_of(images):
    return Small()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))


def evaluate(sets, against, host=None, metrics=METRICS, batch_size=64, limit=None):
    host = host or Host()
    networks = [FeatureNetwork(Small(), host)]
    opened = [open_pictures(path, limit) for path in sets]
    found = None
    if against is not None:
        found = load_gen_reference(
            str(against), SIDE, host, networks, metrics, batch_size=batch_size
        )
    return evaluate_generation(
        opened, host, networks, metrics=metrics, reference=found, batch_size=batch_size
    )


@pytest.fixture(scope="module")
def whole(files):
    return evaluate([files["a"]], files["reference"])


def test_they_are_torch_fidelitys_numbers(whole):
    ours, theirs = features_of(SAMPLES), features_of(REFERENCE)
    [(_, found)] = whole.sets
    for metric, name in (("fid", "pool"), ("sfid", "spatial"), ("fd_dinov2", "dino")):
        both = [fid_features_to_statistics(rows[name].double()) for rows in (ours, theirs)]
        expected = fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
        assert found[metric] == pytest.approx(expected, rel=1e-6)
    scores = isc_features_to_metric(ours["logits"])
    assert found["is_torch_fidelity"] == pytest.approx(scores["inception_score_mean"], rel=1e-6)
    coverage = calculate_precision_recall_full(ours["pool"], theirs["pool"])
    assert (found["precision"], found["recall"]) == pytest.approx(coverage, rel=1e-6)
    assert 0 < found["recall"] < 1
    assert list(found) == [
        "fid", "sfid", "is", "is_torch_fidelity", "precision", "recall", "fd_dinov2",
    ]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize(("processes", "devices"), [(1, 1), (1, 4), (2, 2), (3, 6)])
def test_neither_batch_nor_devices_nor_processes_count(
    files, whole, batch_size, processes, devices
):
    def work(host):
        return evaluate([files["a"]], files["reference"], host, batch_size=batch_size)

    reports = on_hosts(processes, devices, work)
    [(_, found)] = reports[0].sets
    assert found == pytest.approx(whole.sets[0][1], rel=1e-6)
    assert all(report.describe() == reports[0].describe() for report in reports)


def test_several_sets_give_mean_and_spread(files, whole):
    report = evaluate([files["a"], files["b"]], files["reference"], metrics=("fid", "is"))
    one, other = (figures["fid"] for _, figures in report.sets)
    assert one == whole.sets[0][1]["fid"]
    assert other > one
    found = json.loads(json.dumps(report.describe()))
    assert found["metrics"]["fid"] == {
        "value": pytest.approx((one + other) / 2),
        "spread": pytest.approx((other - one) / 2**0.5),
        "unit": None,
        "images": 75,
    }
    assert [each["path"] for each in found["sets"]] == [str(files["a"]), str(files["b"])]
    assert found["reference"]["count"] == 60
    assert "the reference has 60 images and 75 are compared" in found["warnings"][0]
    assert whole.describe()["metrics"]["fid"]["spread"] is None


def test_only_so_many(files, whole):
    report = evaluate([files["a"]], files["reference"], limit=60)
    assert (report.num_images, report.warnings) == (60, ())
    assert report.sets[0][1]["fid"] != whole.sets[0][1]["fid"]


def moments(spatial=True):
    """As the ADM suite saves them."""
    found = features_of(REFERENCE)
    arrays = {}
    for name, ending in (("pool", ""), ("spatial", "_s")):
        if spatial or not ending:
            rows = found[name].double().numpy()
            arrays |= {f"mu{ending}": rows.mean(0), f"sigma{ending}": np.cov(rows, rowvar=False)}
    return arrays


def test_a_reference_of_the_adm_suite(files, whole, tmp_path):
    """Moments of all, and some images for precision, recall and the second opinion."""
    np.savez(tmp_path / "adm.npz", arr_0=REFERENCE[:40], **moments())
    report = evaluate([files["a"]], tmp_path / "adm.npz")
    [(_, found)] = report.sets
    for metric in ("fid", "sfid", "is"):
        assert found[metric] == pytest.approx(whole.sets[0][1][metric], rel=1e-6)
    theirs = features_of(REFERENCE[:40])["pool"]
    expected = calculate_precision_recall_full(features_of(SAMPLES)["pool"], theirs)
    assert (found["precision"], found["recall"]) == pytest.approx(expected, rel=1e-6)
    assert report.left_out == {}
    assert "published FIDs are of 50,000 samples; fewer, such as these 75," in report.warnings[0]
    assert "compares 75 samples with 40 images" in report.warnings[1]
    assert report.reference.describe()["kind"] == "moments"
    assert report.reference.describe()["images"] == 40


def test_a_reference_of_moments_alone_says_what_it_does_not_allow(files, whole, tmp_path):
    np.savez(tmp_path / "moments.npz", **moments())
    report = evaluate([files["a"]], tmp_path / "moments.npz")
    assert report.metrics == ("fid", "sfid", "is", "is_torch_fidelity")
    assert report.mean("sfid") == pytest.approx(whole.mean("sfid"), rel=1e-6)
    assert list(report.left_out) == ["precision", "recall", "fd_dinov2"]
    assert "precision needs images" in report.left_out["precision"]
    np.savez(tmp_path / "mu.npz", arr_0=REFERENCE, **moments(spatial=False))
    report = evaluate([files["a"]], tmp_path / "mu.npz")
    assert list(report.left_out) == ["sfid"]
    assert "no mu_s and sigma_s" in report.left_out["sfid"]
    with pytest.raises(UserError, match=r"nothing can be measured: .*recall needs images"):
        evaluate([files["a"]], tmp_path / "moments.npz", metrics=("recall",))


def test_shards_as_the_reference(files, whole, tmp_path):
    source = array_source(REFERENCE, np.zeros(len(REFERENCE), np.int64))
    write_shards(source, str(tmp_path / "shards"))
    report = evaluate([files["a"]], tmp_path / "shards")
    assert report.sets[0][1] == pytest.approx(whole.sets[0][1], rel=1e-6)
    assert report.reference.kind == "originals"
    assert report.reference.count == 60


def test_the_inception_score_needs_no_reference(files, whole):
    report = evaluate([files["a"]], None, metrics=("is",))
    assert report.mean("is") == whole.mean("is")
    assert report.describe()["reference"] is None


@pytest.mark.parametrize(
    ("sets", "metrics", "limit", "message"),
    [
        (["a"], ("fid",), 1, r"fid of 1 pictures \(.*a\.npz\): 2 are needed"),
        (["a"], ("recall",), 3, "recall of 3 pictures .* 4 are needed"),
        (["a", "reference"], ("fid",), None, r"a\.npz has 75 .*reference\.npz 60 of 8"),
    ],
)
def test_sets_that_cannot_be_measured(files, sets, metrics, limit, message):
    with pytest.raises(UserError, match=message):
        evaluate([files[name] for name in sets], files["reference"], None, metrics, limit=limit)


def test_features_that_are_not_finite(files):
    host, network = Host(), Small()
    network.pool[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"a\.npz: features that are not finite"):
        evaluate_generation(
            [open_pictures(files["a"])],
            host,
            [FeatureNetwork(network, host)],
            metrics=("fid",),
            reference=load_gen_reference(
                str(files["reference"]), SIDE, host, [FeatureNetwork(Small(), host)], ("fid",)
            ),
        )


def test_a_reference_of_another_size(files, tmp_path):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((5, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match=r"large\.npz: its images are 16 x 16 .* 8 x 8"):
        evaluate([files["a"]], tmp_path / "large.npz")
