"""Reference files for FID: content, identity, and errors."""

import numpy as np
import pytest
import torch
from evaluation_host import Host, on_hosts
from pod_topologies import HYBRID, OWNERS

from rae_xla.errors import UserError
from rae_xla.evaluate.references import (
    Reference,
    check_generation_reference,
    load_fid_reference,
)

SIZE = 16


def features(pixels):
    """A stand-in for Inception: an arbitrary function of the images."""
    return pixels.float().flatten(1)[:, :5]


def read(path):
    return load_fid_reference(path, features, Host(), SIZE)


def random_images(count=21, size=SIZE, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(dtype)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_images(tmp_path, writer):
    images = random_images()
    writer(tmp_path / "ref.npz", arr_0=images, labels=np.zeros(21))
    reference = read(tmp_path / "ref.npz")
    assert (reference.kind, reference.count) == ("images", 21)
    rows = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).flatten(1)[:, :5].double()
    torch.testing.assert_close(reference.gaussian.mean, rows.mean(0))
    torch.testing.assert_close(reference.gaussian.covariance, rows.T.cov())
    assert "21 images in" in str(reference)
    assert reference.sha256 in str(reference)


@pytest.mark.parametrize("owners", [OWNERS["v5e:4x4"], HYBRID], ids=["v5e:4x4", "hybrid"])
def test_the_images_are_counted_once_in_any_order_of_the_devices(tmp_path, owners):
    path = save(tmp_path / "ref.npz", arr_0=random_images(count=150))  # 128 rows are a chunk
    expected = read(path).gaussian
    found = on_hosts(
        max(owners) + 1,
        len(owners),
        lambda host: load_fid_reference(path, features, host, SIZE).gaussian,
        owners,
    )
    for gaussian in found:
        torch.testing.assert_close(gaussian.mean, expected.mean)
        torch.testing.assert_close(gaussian.covariance, expected.covariance)


def test_moments_take_precedence_over_images(tmp_path):
    """In the ADM reference batches, the images are a subset of those measured."""
    sigma = np.diag(np.arange(2048.0))
    path = save(tmp_path / "ref.npz", mu=np.ones(2048), sigma=sigma, arr_0=random_images())
    reference = read(path)
    assert (reference.kind, reference.count) == ("moments", None)
    assert reference.gaussian.mean.dtype == torch.float64
    assert torch.equal(reference.gaussian.covariance, torch.from_numpy(sigma))
    assert "unknown number" in str(reference)
    assert reference.warning(10) is None


def test_hash_identifies_the_file(tmp_path):
    one = read(save(tmp_path / "one.npz", arr_0=random_images()))
    other = read(save(tmp_path / "other.npz", arr_0=random_images() // 2))
    assert one.sha256 != other.sha256


def test_warning_about_another_number_of_images():
    reference = Reference("images", "ref.npz", 50, "abc")
    assert reference.warning(50) is None
    warning = reference.warning(30)
    assert "50" in warning
    assert "30" in warning


lopsided = np.eye(2048)
lopsided[0, 1] = 0.5
WRONG = [
    ("nothing of use", {"images": random_images()}, "neither arr_0 .*mu and sigma.* images"),
    ("one moment", {"mu": np.ones(2048)}, "neither arr_0"),
    ("other features", {"mu": np.ones(64), "sigma": np.eye(64)}, r"mu is \(64,\) .*\(2048,\)"),
    ("values", {"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "not finite"),
    ("no covariance", {"mu": np.ones(2048), "sigma": lopsided}, "not symmetric"),
    ("floats", {"arr_0": random_images(dtype=np.float32)}, "arr_0 is float32 .* must be uint8"),
    ("channels first", {"arr_0": random_images().transpose(0, 3, 1, 2).copy()}, "must be uint8"),
    ("fortran order", {"arr_0": np.asfortranarray(random_images())}, "must be uint8"),
    ("another size", {"arr_0": random_images(size=8)}, "8 x 8 pixels, those .* 16 x 16"),
    ("a single image", {"arr_0": random_images(count=1)}, "1 image has no covariance"),
    ("no image", {"arr_0": random_images(count=0)}, "0 image has no covariance"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "arrays", "message"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_content(tmp_path, what, arrays, message):
    path = save(tmp_path / "ref.npz", **arrays)
    with pytest.raises(UserError, match=rf"ref\.npz.*{message}"):
        read(path)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.npz"):
        read(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(UserError, match=r"not a readable \.npz"):
        read(tmp_path / "text.npz")
    np.savez(tmp_path / "cut.npz", arr_0=random_images())
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"not a readable \.npz"):
        read(tmp_path / "cut.npz")


def test_a_file_in_a_bucket_is_refused():
    with pytest.raises(UserError, match=r"reference gs://b/r\.npz: a file must be local"):
        check_generation_reference("gs://b/r.npz", 64)
    with pytest.raises(UserError, match=r"reference gs://b/r\.npz: a file must be local"):
        load_fid_reference("gs://b/r.npz", lambda rows: rows, Host(), 64)
