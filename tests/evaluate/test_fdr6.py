"""FDr6: its networks equal those of transformers set up as timm does, its parts, its errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from evaluation_host import Host
from hf_encoders import SMALL
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from rae_xla.errors import UserError
from rae_xla.evaluate import fdr6, references
from rae_xla.evaluate.fdr6 import EXTRACTORS, FDR6
from rae_xla.evaluate.fdr6_networks import load_extractor, load_extractors
from rae_xla.evaluate.feature_networks import FeatureModule, FeatureNetwork
from rae_xla.evaluate.generation import evaluate_generation
from rae_xla.evaluate.image_sets import open_images
from rae_xla.evaluate.references import load_generation_reference

BY_NAME = {extractor.name: extractor for extractor in EXTRACTORS}
# Patches of 60 do not divide 256, as those of 14 do not: images are padded to 300.
ODD = SMALL | {"patch_size": 60, "num_hidden_layers": 1}
EVEN = SMALL | {"patch_size": 56, "num_hidden_layers": 1}
NETWORKS = {
    "convnext": lambda: transformers.ConvNextV2Model(
        transformers.ConvNextV2Config(depths=[1, 1, 1, 1], hidden_sizes=[4, 4, 8, 8])
    ),
    "dinov2": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**ODD, image_size=180, mlp_ratio=2)
    ),
    "mae": lambda: transformers.ViTMAEModel(
        transformers.ViTMAEConfig(**EVEN, image_size=224, intermediate_size=48)
    ),
    "siglip2": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**EVEN, image_size=280, intermediate_size=48)
    ),
    "clip": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**ODD, image_size=180, intermediate_size=48)
    ),
}
PADDED = {"dinov2": 300, "clip": 300}
MEANS = {"siglip2": (0.5,) * 3, "clip": (0.48145466, 0.4578275, 0.40821073)}
DEVIATIONS = {"siglip2": (0.5,) * 3, "clip": (0.26862954, 0.26130258, 0.27577711)}


def save(name, folder):
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def expected_features(name, model, pixels):
    """The features by transformers' own forward pass."""
    side = BY_NAME[name].side
    images = F.interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True)
    mean = torch.tensor(MEANS.get(name, (0.485, 0.456, 0.406))).view(3, 1, 1)
    deviation = torch.tensor(DEVIATIONS.get(name, (0.229, 0.224, 0.225))).view(3, 1, 1)
    images = (images / 255 - mean) / deviation
    if name == "convnext":
        return model(images).last_hidden_state.mean((2, 3))
    padded = torch.zeros(len(images), 3, *[PADDED.get(name, side)] * 2)
    padded[:, :, :side, :side] = images
    if name == "mae":
        model.config.mask_ratio = 0.0
        noise = torch.arange(16).float().expand(len(images), -1)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        return model(padded, noise=noise).last_hidden_state[:, 0]
    # The position table, resampled with antialiasing to the grid of the padded image.
    grid = padded.shape[-1] // model.config.patch_size
    embeddings = next(m for m in model.modules() if type(m).__name__.endswith("Embeddings"))
    positions = "position_embeddings" if name == "dinov2" else "position_embedding"
    old = getattr(embeddings, positions)
    table = (old if name == "dinov2" else old.weight).reshape(-1, 24)
    size = model.config.image_size // model.config.patch_size
    extra, patches = table[: len(table) - size**2], table[len(table) - size**2 :]
    patches = patches.reshape(size, size, 24).permute(2, 0, 1)[None]
    patches = F.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
    table = torch.cat([extra, patches[0].permute(1, 2, 0).flatten(0, 1)])
    if name == "dinov2":
        embeddings.position_embeddings = nn.Parameter(table[None])
        return model(padded).last_hidden_state[:, 0]
    config = model.config
    config.image_size = padded.shape[-1]
    if name == "clip":
        config.hidden_act = "gelu"
    other = type(model)(config).eval()
    state = model.state_dict()
    [key] = [key for key in state if "position_embedding" in key]
    other.load_state_dict(state | {key: table})
    return other(padded).pooler_output


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_features_are_those_of_transformers(name, tmp_path):
    model = save(name, tmp_path)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8, generator=generator)
    network = load_extractor(BY_NAME[name], str(tmp_path), "--metrics fid")
    assert not any(parameter.requires_grad for parameter in network.parameters())
    found = network(pixels)[name]
    torch.testing.assert_close(found, expected_features(name, model, pixels), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_missing_network_is_one_clear_error(name, tmp_path):
    extractor = BY_NAME[name]
    message = rf"fdr6 needs {extractor.hub_id}.*weights\.fdr6\.{name}.*hf download.*--metrics fid$"
    with pytest.raises(UserError, match=f"(?s){message}"):
        load_extractor(extractor, None, "--metrics fid")
    with pytest.raises(UserError, match=f"(?s){message}"):
        load_extractor(extractor, str(tmp_path / "none"), "--metrics fid")


def test_the_first_missing_network_is_named(tmp_path):
    save("convnext", tmp_path)
    with pytest.raises(UserError, match="needs facebook/dinov2-large"):
        load_extractors({"convnext": str(tmp_path)}, "--metrics fid")


class SmallNetworks(FeatureModule):
    """Stand-ins: random features under the names of all six networks."""

    def __init__(self):
        super().__init__()
        self.source = "random"
        generator = torch.Generator().manual_seed(0)
        for number, name in enumerate(dict.fromkeys(fdr6.FEATURES.values())):
            self.register_buffer(name, torch.randn(4 + number, 3 * 64, generator=generator))

    def forward(self, pixels):
        rows = pixels.float().flatten(1) / 255 - 0.5
        return {n: nn.functional.silu(rows @ w.T) for n, w in self.named_buffers()}


def random_images(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


@pytest.fixture
def world(tmp_path):
    for name, count in (("samples", 40), ("reference", 30)):
        np.savez(tmp_path / f"{name}.npz", arr_0=random_images(count, count))
    return tmp_path


def evaluate(world, reference="reference.npz", **options):
    host = Host()
    networks = [FeatureNetwork(SmallNetworks(), host)]
    path = str(world / reference)
    found = load_generation_reference(path, 8, host, networks, ["fid", FDR6], **options)
    sets = [open_images(world / "samples.npz")]
    return evaluate_generation(sets, host, networks, metrics=["fid", FDR6], reference=found)


def features_of(world, name):
    images = np.load(world / f"{name}.npz")["arr_0"].transpose(0, 3, 1, 2)
    return SmallNetworks()(torch.from_numpy(images.copy()))


def distance(first, second):
    both = [fid_features_to_statistics(rows.double()) for rows in (first, second)]
    return fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]


def test_it_is_the_mean_of_six_distances_over_their_constants(world):
    samples, reference = features_of(world, "samples"), features_of(world, "reference")
    parts = {
        e.metric: distance(samples[fdr6.FEATURES[e.metric]], reference[fdr6.FEATURES[e.metric]])
        / e.constant
        for e in EXTRACTORS
    }
    assert [e.constant for e in EXTRACTORS] == [1.68, 56.87, 14.19, 0.04, 0.60, 5.60]
    report = evaluate(world)
    [(_, values)] = report.sets
    expected = {"fdr6": sum(parts.values()) / 6, **parts}
    assert {n: values[n] for n in expected} == pytest.approx(expected, rel=1e-6)
    assert next(iter(values)) == "fid"
    assert any("published values of fdr6 use 50,000" in warning for warning in report.warnings)


def write_statistics(world, names=("mu", "sigma")):
    """Write the six files of statistics, of the images of the samples."""
    folder = world / "stats"
    folder.mkdir()
    features = features_of(world, "samples")
    for e in EXTRACTORS:
        mean, covariance = fid_features_to_statistics(
            features[fdr6.FEATURES[e.metric]].double()
        ).values()
        np.savez(folder / e.statistics, **dict(zip(names, (mean, covariance), strict=True)))
    return folder


@pytest.mark.parametrize("names", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
def test_published_statistics_replace_the_images(world, monkeypatch, names):
    sizes = SmallNetworks()
    small = [
        fdr6.Extractor(e.name, e.hub_id, e.side, sizes.get_buffer(fdr6.FEATURES[e.metric]).shape[0],
                       e.constant, e.statistics)
        for e in EXTRACTORS
    ]  # fmt: skip
    monkeypatch.setattr(references, "EXTRACTORS", small)
    folder = write_statistics(world, names)
    report = evaluate(world, fdr6=str(folder))
    [(_, values)] = report.sets
    assert values["fdr6"] == pytest.approx(0, abs=1e-9)  # the statistics are those of the samples
    assert values["fid"] > 0.1  # compared with the images of the reference
    assert f"FDr6: the statistics in {folder}" in str(report.reference)
    np.savez(folder / EXTRACTORS[3].statistics, sigma=np.eye(3))
    with pytest.raises(UserError, match=r"mae_in256_t224_stats\.npz: mu or sigma cannot be read"):
        evaluate(world, fdr6=str(folder))
    (folder / EXTRACTORS[3].statistics).unlink()
    with pytest.raises(UserError, match=r"mae_in256_t224_stats\.npz does not exist: FDr6 compares"):
        evaluate(world, fdr6=str(folder))


def test_the_name_of_the_reference_is_in_the_report(world):
    published = world / "jit_in256_stats.npz"
    (world / "reference.npz").rename(published)
    report = evaluate(world, published.name)
    assert str(report.reference).startswith("JiT: 30 images")
    assert report.describe()["reference"]["name"] == "JiT"
    assert str(evaluate(world, published.name, name="ADM").reference).startswith("ADM: 30")


def test_moments_alone_allow_no_fdr6(world, monkeypatch):
    monkeypatch.setattr(references, "FEATURES", 4)
    np.savez(world / "moments.npz", mu=np.zeros(4), sigma=np.eye(4))
    report = evaluate(world, "moments.npz")
    assert report.left_out.keys() == {"fdr6"}
    assert "eval.fdr6_reference" in report.left_out["fdr6"]
    assert [list(values) for _, values in report.sets] == [["fid"]]
