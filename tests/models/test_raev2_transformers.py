"""In-context conditioning, base head and REPA projection: numbers of RAEv2, options and errors."""

from __future__ import annotations

import pytest
import torch
from golden_case import load_case
from raev2_cases import build, context, model_settings, outputs

from rae_xla.errors import UserError
from rae_xla.models.dit import LightningDiT
from rae_xla.models.dit_dh import DiTDH
from rae_xla.models.pretrained.dit_layouts import from_raev2, to_raev2

CASES = [
    "ddt_ig_a",
    "ddt_ig_equal_width",
    "ddt_ig_nwm",
    "ddt_ig_patch2",
    "ddt_ig_repa",
    "ddt_plain",
    "lightningdit_ig",
]
KEYMAPS = ["DiTDH-XL-IG_imagenet_dinov3l", "DiTDH-XL_imagenet_dinov3l_noIG"]
TINY = {
    "input_size": 4,
    "in_channels": 8,
    "hidden_size": [32, 48],
    "depth": [3, 1],
    "num_heads": [4, 4],
    "num_classes": 5,
}
TINY_DIT = TINY | {"hidden_size": 32, "depth": 3, "num_heads": 4}


def random_model(model_class=DiTDH, **options):
    """Build a tiny model with random values in the layers that are initialised to zero."""
    torch.manual_seed(0)
    model = model_class(**((TINY if model_class is DiTDH else TINY_DIT) | options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 8, 4, 4, generator=generator), torch.rand(4), torch.arange(4)


@pytest.mark.parametrize("name", CASES)
def test_outputs_match_golden_values(name):
    model, case = build(f"stage2/{name}")
    found = outputs(model, case)
    assert found.keys() == case.under("out").keys()
    for key, value in found.items():
        torch.testing.assert_close(value, case[f"out.{key}"], atol=2e-5, rtol=1e-4)
    alone = model(case["in.x"], case["in.t"], context(case))
    assert torch.equal(alone, found["full"])


@pytest.mark.parametrize("name", CASES)
def test_gradients_match_golden_values(name):
    model, case = build(f"stage2/{name}")
    found = outputs(model, case)
    loss = sum((value * case[f"in.cotangent_{key}"]).mean() for key, value in found.items())
    loss.backward()
    assert loss.item() == pytest.approx(case.meta["loss_value"], rel=1e-4, abs=1e-6)
    gradients = to_raev2({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    norms = {key: gradient.norm().item() for key, gradient in gradients.items()}
    assert norms == pytest.approx(case.meta["grad_norms"], rel=1e-3, abs=1e-9)
    for key, recorded in case.under("grad").items():
        error = (gradients[key] - recorded).norm()
        assert error <= 1e-3 * recorded.norm(), key


@pytest.mark.parametrize("name", KEYMAPS)
def test_key_map_matches_published_file(name):
    meta = load_case(f"raev2/keymaps/{name}").meta
    with torch.device("meta"):
        model = DiTDH(**model_settings(meta["config"] | {"cond_arch": {}}))
    published = to_raev2(model.state_dict())
    assert {key: list(value.shape) for key, value in published.items()} == meta["keys"]
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == meta["parameters"]
    assert all(p.requires_grad for p in parameters)


def test_layout_conversion_is_the_identity_there_and_back():
    model = random_model(conditioning="tokens", base_model_depth=2, use_pos_embed=False)
    own = model.state_dict()
    published = to_raev2(own)
    assert published.keys().isdisjoint({"blocks.0.attn.qkv.weight", "y_embedder.learnable_tokens"})
    back = from_raev2(published)
    assert back.keys() == own.keys()
    assert all(torch.equal(back[key], own[key]) for key in own)
    adaln = random_model().state_dict()
    assert to_raev2(adaln) == adaln == from_raev2(adaln)


def test_incomplete_file_is_reported_by_its_own_keys():
    model = random_model(conditioning="tokens")
    published = to_raev2(model.state_dict())
    del published["blocks.1.attn.k.weight"]
    assert "blocks.1.attn.q.weight" in from_raev2(published)


def test_initialisation():
    torch.manual_seed(0)
    model = DiTDH(**TINY, conditioning="tokens", base_model_depth=2)
    zero = {k for k, p in model.named_parameters() if k.endswith("weight") and not p.any()}
    assert zero == {
        "blocks.3.adaLN_modulation.1.weight",
        *(f"{head}.{layer}.weight" for head in ("final_layer", "base_final_layer")
          for layer in ("linear", "adaLN_modulation.1")),
    }  # fmt: skip
    for tokens in (model.t_embedder.learnable_tokens, model.y_embedder.learnable_tokens):
        assert tokens.std().item() == pytest.approx(32**-0.5, rel=0.2)
    found = model(*inputs(), all_outputs=True)
    assert not found.full.any()
    assert not found.base.any()


def test_init_weights_after_meta_device():
    with torch.device("meta"):
        model = DiTDH(**TINY, conditioning="tokens", repa_layer_depth=1, z_dim=3)
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(torch.nan)
    model.init_weights()
    built = DiTDH(**TINY, conditioning="tokens", repa_layer_depth=1, z_dim=3)
    assert all(p.isfinite().all() for p in model.parameters())
    for name, table in built.named_buffers():
        assert torch.equal(model.get_buffer(name), table), name


@pytest.mark.parametrize("model_class", [DiTDH, LightningDiT])
@pytest.mark.parametrize(
    "options",
    [
        {"base_model_depth": 2},
        {"base_model_depth": 3, "use_qknorm": True},
        {"repa_layer_depth": 1, "z_dim": 5},
        {"conditioning": "tokens"},
        {"conditioning": "tokens", "use_rmsnorm": False, "use_swiglu": False, "use_rope": False},
    ],
)
def test_each_option_works_alone(model_class, options):
    model = random_model(model_class, **options).train()
    found = model(*inputs(), all_outputs=True)
    assert (found.base is None) == ("base_model_depth" not in options)
    assert (found.repa is None) == ("repa_layer_depth" not in options)
    sum(value.square().mean() for value in found if value is not None).backward()
    without = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_base_head_leaves_the_model_unchanged():
    x, t, y = inputs()
    plain, with_head = random_model().eval(), random_model(base_model_depth=2).eval()
    with_head.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(with_head(x, t, y), plain(x, t, y))


def test_equal_patches_of_encoder_and_head():
    model = random_model(patch_size=2)
    x, t, y = inputs()
    assert model(x, t, y).shape == x.shape
    assert model.s_embedder.proj.weight.shape == (32, 8, 2, 2)


@pytest.mark.parametrize("model_class", [DiTDH, LightningDiT])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "token"}, "conditioning: 'token' is not one of adaln, tokens"),
        ({"conditioning": "tokens", "num_t_tokens": 0}, "num_t_tokens: .* at least 1, got 0"),
        ({"base_model_depth": 4}, "base_model_depth: .* from 1 to 3, got 4"),
        ({"repa_layer_depth": 0, "z_dim": 3}, "repa_layer_depth: .* from 1 to 3, got 0"),
        ({"repa_layer_depth": 1}, "z_dim: repa_layer_depth is 1"),
    ],
)
def test_invalid_options_raise(model_class, options, message):
    with pytest.raises(UserError, match=message):
        random_model(model_class, **options)


def test_tokens_need_fourier_times():
    with pytest.raises(UserError, match="use_gembed"):
        random_model(LightningDiT, conditioning="tokens", use_gembed=False)
