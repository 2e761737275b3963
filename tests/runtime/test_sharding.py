"""Sharding rules: files, matching, and the placements of the published models."""

import pytest
import torch
from golden_case import GOLDEN
from torch import nn

from rae_xla.models.decoder import ViTDecoder
from rae_xla.models.dit import LightningDiT
from rae_xla.models.dit_dh import DiTDH
from rae_xla.models.encoders import DINOv2Encoder, MAEEncoder, SigLIP2Encoder
from rae_xla.runtime.sharding import Placement, load_rules, resolve_shardings

SIXTEEN = {"data": 1, "fsdp": 16, "tensor": 1}
FSDP = "fsdp"
ALTERNATIVES = "configs/sharding/alternatives"


@pytest.fixture(scope="module")
def rules():
    return load_rules(["configs/sharding"])


def on_meta(build):
    with torch.device("meta"):
        return build()


def test_the_state_of_the_published_model_is_sharded_sixteen_ways(rules):
    model = on_meta(DiTDH)
    placements = resolve_shardings(model, rules, SIXTEEN).parameters
    assert placements["blocks.0.attn.qkv.weight"] == Placement((None, FSDP), (None, None))
    assert placements["blocks.0.attn.proj.weight"] == Placement((FSDP, None), (None, None))
    # 1,001 labels and 5,461 gated features do not divide by 16
    assert placements["blocks.29.mlp.w12.weight"].stored == (None, FSDP)
    assert placements["blocks.29.mlp.w3.weight"].stored == (FSDP, None)
    assert placements["y_embedder.embedding_table.weight"].stored == (None, FSDP)
    assert placements["blocks.0.attn.qkv.bias"].stored == (None,)
    assert placements["x_embedder.proj.weight"].stored == (FSDP, None, None, None)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    held = sum(n / 16 if any(placements[name].stored) else n for name, n in sizes.items())
    assert held <= 1.02 * sum(sizes.values()) / 16


@pytest.mark.parametrize(
    "build",
    [
        lambda: LightningDiT(hidden_size=1152, depth=2, num_heads=16),
        lambda: DiTDH(depth=(1, 1), use_swiglu=False, use_rmsnorm=False, use_qknorm=True),
        lambda: ViTDecoder("configs/decoder/ViTXL", 256),
    ],
)
def test_every_matrix_of_the_other_networks_is_sharded(rules, build):
    model = on_meta(build)
    placements = resolve_shardings(model, rules, SIXTEEN).parameters
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            assert any(placements[name].stored), name


def test_outputs_of_blocks_are_sharded_by_rows(rules):
    activations = resolve_shardings(on_meta(DiTDH), rules, SIXTEEN).activations
    assert activations["blocks.29"] == ("fsdp",)


def test_the_tensor_axis_shards_the_computation_of_layers(rules):
    sizes = {"data": 2, "fsdp": 4, "tensor": 2}
    shardings = resolve_shardings(on_meta(DiTDH), rules, sizes)
    both = ("fsdp", "tensor")
    placements = shardings.parameters
    assert placements["blocks.0.mlp.w12.weight"] == Placement((None, both), ("tensor", None))
    assert placements["blocks.0.mlp.w3.weight"] == Placement((both, None), (None, "tensor"))
    assert placements["blocks.0.adaLN_modulation.1.weight"] == Placement((both, None), (None, None))
    assert shardings.activations["blocks.29"] == (("data", "fsdp"),)


def test_a_network_inside_another_module_is_found(rules):
    holder = nn.ModuleDict({"rae": nn.ModuleDict({"net": on_meta(lambda: DiTDH(depth=(1, 1)))})})
    shardings = resolve_shardings(holder, rules, SIXTEEN)
    assert shardings.parameters["rae.net.blocks.0.attn.qkv.weight"].stored == (None, FSDP)
    assert "rae.net.blocks.0" in shardings.activations


def write(folder, text):
    path = folder / "rules.yaml"
    path.write_text(text)
    return load_rules([str(path)])


def resolve(folder, parameters, model, sizes=SIXTEEN):
    return resolve_shardings(
        model, write(folder, f"networks: [Linear]\nparameters: {parameters}\n"), sizes
    )


LARGE = 2048


@pytest.mark.parametrize(
    ("parameters", "features", "message"),
    [
        ("[{pattern: weight, spec: [fsdp]}, {pattern: wieght, spec: []}]", 64, "wieght.*nothing"),
        ("[{pattern: '.', spec: []}, {pattern: bias, spec: []}]", 64, "'bias' matches nothing"),
        ("[{pattern: bias, spec: []}]", LARGE, "no rule matches weight"),
        ("[{pattern: weight, spec: [fsdp]}]", LARGE + 8, r"weight .* does not divide evenly"),
        ("[{pattern: bias, spec: [null, fsdp]}]", 64, "the spec of bias has 2 entries"),
    ],
)
def test_rules_that_do_not_fit_their_network_are_refused(tmp_path, parameters, features, message):
    with pytest.raises(ValueError, match=message):
        resolve(tmp_path, parameters, on_meta(lambda: nn.Linear(features, features)))


def test_a_small_parameter_that_does_not_divide_is_replicated(tmp_path):
    rule = "[{pattern: weight, spec: [fsdp]}]"
    assert resolve(tmp_path, rule, nn.Linear(4, 6)).parameters["weight"].stored == (None, None)


def test_a_large_trained_parameter_without_rules_is_refused(rules):
    model = on_meta(lambda: nn.Linear(LARGE, LARGE))
    with pytest.raises(ValueError, match="no sharding rules cover weight"):
        resolve_shardings(model, rules, SIXTEEN)
    resolve_shardings(model.requires_grad_(False), rules, SIXTEEN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("networks: []\n", "expected the keys networks"),
        ("- 1\n", "expected the keys networks"),
        ("network: [A]\n", "expected the keys networks"),
        ("networks: [A]\nparameters: [{spec: []}]\n", "is not a rule"),
        ("networks: [A]\nparameters: [{pattern: a, spec: [], usd: []}]\n", "optionally else, used"),
        ("networks: [A]\nparameters: [{pattern: '(', spec: []}]\n", "not a regular expression"),
        (
            "networks: [A]\nparameters: [{pattern: a, spec: [fdsp]}]\n",
            r"\['fdsp'\] is not a partition",
        ),
        ("networks: [A]\nparameters: [{pattern: a, spec: fsdp}]\n", "is not a partition spec"),
        ("networks: [A]\nparameters: [{pattern: a, spec: [fsdp, batch]}]\n", "at most once"),
        ("networks: [A]\nactivations: [{pattern: a, spec: [b]}]\n", "is not a partition spec"),
        ("networks: [A\n", "cannot be read"),
    ],
)
def test_invalid_files_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, text)


def test_a_file_that_is_not_text_and_a_folder_without_rules_are_refused(tmp_path):
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"image\.yaml cannot be read"):
        load_rules([str(tmp_path / "image.yaml")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"mesh\.sharding: the folder .*empty has no \.yaml files"):
        load_rules([str(tmp_path / "empty")])


def test_a_later_file_takes_precedence(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("networks: [DiTDH]\nparameters: [{pattern: '.', spec: []}]\n")
    rules = load_rules(["configs/sharding", str(own)])
    found = resolve_shardings(on_meta(lambda: DiTDH(depth=(1, 1))), rules, SIXTEEN)
    assert not any(any(p.stored) for p in found.parameters.values())
    with pytest.raises(ValueError, match="elsewhere does not exist"):
        load_rules(["elsewhere"])


def test_rules_are_found_from_any_working_directory(tmp_path, monkeypatch, rules):
    monkeypatch.chdir(tmp_path)
    assert load_rules(["configs/sharding"]).keys() == rules.keys()


@pytest.mark.parametrize(
    ("encoder", "folder"),
    [(DINOv2Encoder, "dinov2"), (SigLIP2Encoder, "siglip2"), (MAEEncoder, "mae")],
)
def test_encoders_are_replicated_or_sharded(rules, encoder, folder):
    model = encoder(str(GOLDEN / f"rae/{folder}/encoder"))
    sizes = {"data": 1, "fsdp": 4, "tensor": 1}
    replicated = resolve_shardings(model, rules, sizes).parameters
    assert not any(any(placement.stored) for placement in replicated.values())
    alternative = load_rules(["configs/sharding", f"{ALTERNATIVES}/encoders_sharded.yaml"])
    sharded = resolve_shardings(model, alternative, sizes).parameters
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and name.endswith("weight") and "position" not in name:
            assert any(sharded[name].stored), name
