"""DiTDH: golden values, key maps, initialisation, options and errors."""

from __future__ import annotations

import pytest
import torch
from golden_case import Case, load_case

from rae_xla.errors import UserError
from rae_xla.models.dit_dh import DiTDH

WITH_GRADIENTS = ["ddt_a_published", "ddt_b_qknorm", "ddt_c_layernorm_gelu"]
FORWARD_ONLY = ["ddt_noposembed_nodrop", "ddt_norope_repaired", "ddt_woshift_repaired"]
TINY = {
    "input_size": 4,
    "in_channels": 8,
    "hidden_size": [32, 48],
    "depth": [2, 1],
    "num_heads": [4, 4],
    "num_classes": 5,
}


def build(case: Case, prefix: str = "") -> DiTDH:
    model = DiTDH(**case.meta[f"{prefix}config"])
    model.load_state_dict(case.under(f"{prefix}state"))
    return model.eval()


def random_model(**options: object) -> DiTDH:
    """Build a tiny model with random values in the layers that are initialised to zero."""
    torch.manual_seed(0)
    model = DiTDH(**(TINY | options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 8, 4, 4, generator=generator)
    return x, torch.linspace(0.1, 0.9, batch), torch.arange(batch) % 5


@pytest.mark.parametrize("name", WITH_GRADIENTS + FORWARD_ONLY)
def test_forward_matches_golden_values(name: str) -> None:
    case = load_case(f"stage2/{name}")
    out = build(case)(case["in.x"], case["in.t"], case["in.y"])
    torch.testing.assert_close(out, case["out.forward"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradient_norms_match_golden_values(name: str) -> None:
    case = load_case(f"stage2/{name}")
    model = build(case)
    out = model(case["in.x"], case["in.t"], case["in.y"])
    loss = (out - case["in.target"]).square().mean()
    loss.backward()
    norms = {k: p.grad.norm().item() for k, p in model.named_parameters() if p.grad is not None}
    assert loss.item() == pytest.approx(case.meta["loss"], rel=1e-5)
    assert norms == pytest.approx(case.meta["grad_norms"], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_guide_model_matches_golden_values(name: str) -> None:
    case = load_case(f"stage2/{name}")
    out = build(case, "guide_")(case["in.x"], case["in.t"], case["in.y"])
    torch.testing.assert_close(out, case["out.guide_forward"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
@pytest.mark.parametrize("divisor", [1, 4])
def test_given_s_bypasses_encoder(name: str, divisor: int) -> None:
    case = load_case(f"stage2/{name}")
    model = build(case)
    s = case[f"in.s_div{divisor}"]
    out = model(case["in.x"], case["in.t"], case["in.y"], s=s)
    torch.testing.assert_close(out, case[f"out.forward_s_div{divisor}"], atol=2e-5, rtol=1e-4)
    assert torch.equal(out, model(case["in.x"], 1 - case["in.t"], case["in.y"] * 0, s=s))


@pytest.mark.parametrize("name", ["DiTDH-S_in16", "DiTDH-S_in32", "DiTDH-XL_in16", "DiTDH-XL_in32"])
def test_key_map_matches_published_file(name: str) -> None:
    meta = load_case(f"keymaps/{name}").meta
    with torch.device("meta"):
        model = DiTDH(**meta["config"])
    keys = {
        k: [list(v.shape), str(v.dtype)[len("torch.") :]] for k, v in model.state_dict().items()
    }
    assert list(keys) == list(meta["keys"])
    assert keys == meta["keys"]
    parameters = list(model.named_parameters())
    assert sum(p.numel() for _, p in parameters) == meta["n_params"]
    assert [k for k, p in parameters if not p.requires_grad] == meta["frozen_by_default"]
    assert [k for k, _ in model.named_buffers()] == meta["persistent_buffers"]


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_position_table_matches_published_file(name: str) -> None:
    case = load_case(f"stage2/{name}")
    table = DiTDH(**case.meta["config"]).pos_embed
    torch.testing.assert_close(table.data, case["init.pos_embed"], atol=1e-6, rtol=0)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = DiTDH(**TINY).eval()
    zero = {k for k, p in model.named_parameters() if not p.any()}
    assert zero == {
        *(f"blocks.{i}.adaLN_modulation.1.{kind}" for i in range(3) for kind in ("weight", "bias")),
        *(f"final_layer.adaLN_modulation.1.{kind}" for kind in ("weight", "bias")),
        *(f"final_layer.linear.{kind}" for kind in ("weight", "bias")),
        "x_embedder.proj.bias",
        "s_embedder.proj.bias",
    }
    weights = dict(model.named_parameters())
    assert weights["t_embedder.W"].std().item() == pytest.approx(1, rel=0.15)
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"):
        assert weights[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.2), name
    # The others have PyTorch's default, uniform within 1/sqrt(fan_in), including the bias.
    for part in ("weight", "bias"):
        largest = weights[f"blocks.0.attn.qkv.{part}"].abs().max()
        assert 0.9 * 32**-0.5 < largest <= 32**-0.5


def test_init_weights_after_meta_device() -> None:
    with torch.device("meta"):
        model = DiTDH(**TINY)
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(torch.nan)
    model.init_weights()
    built = DiTDH(**TINY)
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model.pos_embed, built.pos_embed)
    for name, table in built.named_buffers():
        assert torch.equal(model.get_buffer(name), table), name


@pytest.mark.parametrize(
    "options",
    [{"use_rope": False}, {"wo_shift": True}, {"use_pos_embed": False}, {"use_qknorm": True}],
)
def test_options_run_and_train(options: dict[str, object]) -> None:
    model = random_model(**options).train()
    model(*inputs()).square().mean().backward()
    without = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_coarse_encoder_patches_require_given_s() -> None:
    model = random_model(patch_size=[2, 1])
    x, t, y = inputs()
    s = torch.randn(4, 4, 32)
    coarse = model(x, t, y, s=s)
    assert coarse.shape == x.shape
    torch.testing.assert_close(coarse, model(x, t, y, s=s.repeat_interleave(4, dim=1)))
    with pytest.raises(UserError, match="patch size of 2"):
        model(x, t, y)


def test_label_drop_selects_null_label_only_in_train_mode() -> None:
    model = random_model(class_dropout_prob=0.5)
    x, t, y = inputs(64)
    drop = torch.arange(64) % 3 == 0
    plain, null = model.eval()(x, t, y), model(x, t, torch.full_like(y, 5))
    model.train()
    given = model(x, t, y, label_drop=drop)
    torch.testing.assert_close(given, torch.where(drop[:, None, None, None], null, plain))

    torch.manual_seed(3)
    generated = model(x, t, y)
    torch.manual_seed(3)
    expected = model(x, t, y, label_drop=torch.rand(64) < 0.5)
    assert torch.equal(generated, expected)


def test_blocks_are_called_with_tensors_only() -> None:
    # Passes that wrap ``blocks[i]`` (rematerialisation, scan) rely on it.
    model = random_model()
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args))
    model.eval()(*inputs())
    assert [(x.shape, c.shape, rope[0].shape) for x, c, rope in seen] == [
        ((4, 16, 32), (4, 1, 32), (16, 8)),
        ((4, 16, 32), (4, 1, 32), (16, 8)),
        ((4, 16, 48), (4, 16, 48), (16, 12)),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": [1, 2]}, r"patch_size: the head .*got \[1, 2\]"),
        ({"hidden_size": [32, 48, 64]}, r"hidden_size: expected \[encoder, head\]"),
        ({"num_heads": [5, 4]}, "hidden_size 32 is not divisible by num_heads 5"),
        ({"num_heads": 16}, "head_dim 2 is not a multiple of 4"),
        ({"hidden_size": [30, 48], "num_heads": [5, 4], "use_rope": False}, "multiple of 4"),
    ],
)
def test_invalid_sizes_raise(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiTDH(**(TINY | options))


def test_invalid_inputs_raise() -> None:
    model = random_model().eval()
    x, t, y = inputs()
    with pytest.raises(UserError, match=r"\(8, 4, 4\).*got \(8, 8, 8\)"):
        model(torch.zeros(4, 8, 8, 8), t, y)
    with pytest.raises(UserError, match=r"label is outside 0\.\.5"):
        model(x, t, y + 5)
    with pytest.raises(UserError, match="3 tokens does not fit 16"):
        model(x, t, y, s=torch.zeros(4, 3, 32))
