"""Reference files: what they hold, and every way to get them wrong."""

import numpy as np
import pytest
import torch

from rae_xla.errors import UserError
from rae_xla.evaluate.reference import Reference, load_reference
from rae_xla.runtime.mesh import MeshShape

SIZE = 16


class Host:
    """As much of a runtime as is needed: everything stays where it is."""

    mesh = MeshShape(data=1, fsdp=1)
    process_index, process_count = 0, 1

    def put(self, batch):
        return batch

    def to_host(self, tensors):
        return tensors


def features(pixels):
    """Standing in for Inception: any function of the pictures will do."""
    return pixels.float().flatten(1)[:, :5]


def read(path):
    return load_reference(path, features, Host(), SIZE)


def pictures(count=21, size=SIZE, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(dtype)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_images(tmp_path, writer):
    images = pictures()
    writer(tmp_path / "ref.npz", arr_0=images, labels=np.zeros(21))
    found = read(tmp_path / "ref.npz")
    assert (found.kind, found.count) == ("images", 21)
    rows = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).flatten(1)[:, :5].double()
    torch.testing.assert_close(found.gaussian.mean, rows.mean(0))
    torch.testing.assert_close(found.gaussian.covariance, rows.T.cov())
    assert "21 images in" in str(found)
    assert found.sha256 in str(found)


def test_moments_even_beside_images(tmp_path):
    """As in the ADM reference batches, whose images are only some of those measured."""
    sigma = np.diag(np.arange(2048.0))
    path = save(tmp_path / "ref.npz", mu=np.ones(2048), sigma=sigma, arr_0=pictures())
    found = read(path)
    assert (found.kind, found.count) == ("moments", None)
    assert found.gaussian.mean.dtype == torch.float64
    assert torch.equal(found.gaussian.covariance, torch.from_numpy(sigma))
    assert "unknown number" in str(found)
    assert found.warning(10) is None


def test_the_hash_tells_files_apart(tmp_path):
    one = read(save(tmp_path / "one.npz", arr_0=pictures()))
    other = read(save(tmp_path / "other.npz", arr_0=pictures() // 2))
    assert one.sha256 != other.sha256


def test_another_count_is_worth_a_warning():
    reference = Reference("images", "ref.npz", 50, "abc")
    assert reference.warning(50) is None
    assert "50 images and 30 are compared" in reference.warning(30)


lopsided = np.eye(2048)
lopsided[0, 1] = 0.5
WRONG = [
    ("nothing of use", {"images": pictures()}, "neither arr_0 .* nor mu and sigma .* images"),
    ("one moment", {"mu": np.ones(2048)}, "neither arr_0"),
    ("other features", {"mu": np.ones(64), "sigma": np.eye(64)}, r"mu is \(64,\) .*\(2048,\)"),
    ("values", {"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "not finite"),
    ("no covariance", {"mu": np.ones(2048), "sigma": lopsided}, "not symmetric"),
    ("floats", {"arr_0": pictures(dtype=np.float32)}, "arr_0 is float32 .* must be uint8"),
    ("channels first", {"arr_0": pictures().transpose(0, 3, 1, 2).copy()}, "must be uint8"),
    ("fortran order", {"arr_0": np.asfortranarray(pictures())}, "must be uint8"),
    ("another size", {"arr_0": pictures(size=8)}, "8 x 8 pixels, those .* 16 x 16"),
    ("a single image", {"arr_0": pictures(count=1)}, "1 image has no covariance"),
    ("no image", {"arr_0": pictures(count=0)}, "0 image has no covariance"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "arrays", "message"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_content(tmp_path, what, arrays, message):
    path = save(tmp_path / "ref.npz", **arrays)
    with pytest.raises(UserError, match=rf"ref\.npz.*{message}"):
        read(path)


def test_files_that_are_no_archives(tmp_path):
    with pytest.raises(UserError, match=r"none\.npz: there is no such file"):
        read(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"not a readable \.npz"):
        read(tmp_path / "text.npz")
    np.savez(tmp_path / "cut.npz", arr_0=pictures())
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"not a readable \.npz"):
        read(tmp_path / "cut.npz")
