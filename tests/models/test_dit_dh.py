"""DiTDH against the reference numbers, its key maps, its options and its errors."""

from __future__ import annotations

import pytest
import torch
from golden_case import Case, load_case

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
    """A tiny model with its zero-initialised layers filled, so that nothing hides behind a zero."""
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
def test_forward_gives_the_reference_numbers(name: str) -> None:
    case = load_case(f"stage2/{name}")
    out = build(case)(case["in.x"], case["in.t"], case["in.y"])
    torch.testing.assert_close(out, case["out.forward"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_have_the_reference_norms(name: str) -> None:
    case = load_case(f"stage2/{name}")
    model = build(case)
    out = model(case["in.x"], case["in.t"], case["in.y"])
    loss = (out - case["in.target"]).square().mean()
    loss.backward()
    norms = {k: p.grad.norm().item() for k, p in model.named_parameters() if p.grad is not None}
    assert loss.item() == pytest.approx(case.meta["loss"], rel=1e-5)
    assert norms == pytest.approx(case.meta["grad_norms"], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_guide_model_gives_the_reference_numbers(name: str) -> None:
    case = load_case(f"stage2/{name}")
    out = build(case, "guide_")(case["in.x"], case["in.t"], case["in.y"])
    torch.testing.assert_close(out, case["out.guide_forward"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
@pytest.mark.parametrize("divisor", [1, 4])
def test_given_s_bypasses_the_encoder(name: str, divisor: int) -> None:
    case = load_case(f"stage2/{name}")
    if f"in.s_div{divisor}" not in case.tensors:
        pytest.skip("not recorded for this case")
    model = build(case)
    s = case[f"in.s_div{divisor}"]
    out = model(case["in.x"], case["in.t"], case["in.y"], s=s)
    torch.testing.assert_close(out, case[f"out.forward_s_div{divisor}"], atol=2e-5, rtol=1e-4)
    assert torch.equal(out, model(case["in.x"], 1 - case["in.t"], case["in.y"] * 0, s=s))


@pytest.mark.parametrize("name", ["DiTDH-S_in16", "DiTDH-S_in32", "DiTDH-XL_in16", "DiTDH-XL_in32"])
def test_key_map_is_the_published_one(name: str) -> None:
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
