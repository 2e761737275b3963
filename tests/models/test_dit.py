"""LightningDiT: golden values, key map, initialisation, options and errors."""

from __future__ import annotations

import pytest
import torch
from golden_case import Case, load_case

from rae_xla.errors import UserError
from rae_xla.models.dit import LightningDiT

CASES = ["lightningdit_a", "lightningdit_b_patch2"]
TINY = {
    "input_size": 4,
    "in_channels": 8,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}


def build(case: Case) -> LightningDiT:
    model = LightningDiT(**case.meta["config"])
    model.load_state_dict(case.under("state"))
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_match_golden_values(name: str) -> None:
    case = load_case(f"stage2/{name}")
    model = build(case)
    out = model(case["in.x"], case["in.t"], case["in.y"])
    torch.testing.assert_close(out, case["out.forward"], atol=2e-5, rtol=1e-4)

    loss = (out - case["in.target"]).square().mean()
    loss.backward()
    norms = {k: p.grad.norm().item() for k, p in model.named_parameters() if p.grad is not None}
    assert loss.item() == pytest.approx(case.meta["loss"], rel=1e-5)
    # Without RoPE a key bias does not affect attention: its gradient is rounding, about 1e-9.
    assert norms == pytest.approx(case.meta["grad_norms"], rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_position_table_matches_published_file(name: str) -> None:
    case = load_case(f"stage2/{name}")
    table = LightningDiT(**case.meta["config"]).pos_embed
    assert not table.requires_grad
    torch.testing.assert_close(table.data, case["init.pos_embed"], atol=1e-6, rtol=0)


def test_default_key_map_matches_published_file() -> None:
    meta = load_case("keymaps/LightningDiT-XL_defaults").meta
    with torch.device("meta"):
        model = LightningDiT()
    keys = {
        k: [list(v.shape), str(v.dtype)[len("torch.") :]] for k, v in model.state_dict().items()
    }
    assert list(keys) == list(meta["keys"])
    assert keys == meta["keys"]
    parameters = list(model.named_parameters())
    assert sum(p.numel() for _, p in parameters) == meta["n_params"]
    assert [k for k, p in parameters if not p.requires_grad] == meta["frozen_by_default"]
    assert [k for k, _ in model.named_buffers()] == meta["persistent_buffers"]


@pytest.mark.parametrize(
    "options",
    [
        {"patch_size": 2},
        {"use_rope": False},
        {"wo_shift": True},
        {"learn_sigma": True},
        {"use_gembed": False},
        {"class_dropout_prob": 0.0},
    ],
)
def test_options_run_and_train(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = LightningDiT(**(TINY | options)).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(3, 8, 4, 4)
    out = model(x, torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 2, 4]))
    assert out.shape == x.shape
    out.square().mean().backward()
    without = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_initialisation_is_xavier_with_zero_output() -> None:
    torch.manual_seed(0)
    model = LightningDiT(**TINY).eval()
    linears = {k: m for k, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, linear in linears.items():
        assert not linear.bias.any(), name
        bound = (6 / sum(linear.weight.shape)) ** 0.5
        if "adaLN" in name or name == "final_layer.linear":
            assert not linear.weight.any(), name
        elif name.startswith("t_embedder"):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            assert 0.95 * bound < linear.weight.abs().max() <= bound, name
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.2)
    x = torch.randn(2, 8, 4, 4)
    assert not model(x, torch.rand(2), torch.tensor([0, 1])).any()


def test_invalid_sizes_and_inputs_raise() -> None:
    with pytest.raises(UserError, match="patch_size 3"):
        LightningDiT(**(TINY | {"patch_size": 3}))
    model = LightningDiT(**TINY)
    with pytest.raises(UserError, match=r"\(8, 4, 4\).*got \(8, 8, 8\)"):
        model(torch.zeros(1, 8, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
