"""Generation from prompts on XLA: golden text, conditions and latents."""

from __future__ import annotations

import pytest
import torch
from golden_case import load_case
from text_to_image_cases import build_model

from rae_xla.models.text_to_image.generation import StopTokens, generate
from rae_xla.models.text_to_image.latents import to_tokens
from rae_xla.transport import guided
from rae_xla.transport.sized_flow import SizedFlow, size_shift

torch_xla = pytest.importorskip("torch_xla")
pytestmark = pytest.mark.xla

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.mark.parametrize(
    "batch",
    [pytest.param(1, marks=pytest.mark.nightly), 3, pytest.param(8, marks=pytest.mark.nightly)],
)
@pytest.mark.parametrize(
    "use_cache",
    [False, pytest.param(True, marks=pytest.mark.nightly)],  # a program for each token
)
def test_prompt_gives_the_golden_text_and_latents(batch: int, use_cache: bool) -> None:
    case = load_case("t2i/generate/greedy_t2i")
    config, ids = case.meta["config"], case.meta["special_ids"]
    device = torch_xla.device()
    model = build_model(case, tokens=config["tokens_per_image"], channels=config["C"]).to(device)
    prompt = case["in.t2i.input_ids"].tolist()
    # Other prompts of other lengths, which end at other steps.
    prompts = [prompt, *(prompt[: 20 + 3 * i] for i in range(batch - 1))]
    [result, *_] = generate(
        model,
        prompts,
        StopTokens(ids["eos"], ids["im_start"]),
        max_new_tokens=case.meta["max_new_tokens"]["t2i"],
        use_cache=use_cache,
    )
    assert result.ids == case["out.t2i.generated_ids"].tolist()
    assert result.condition is not None
    condition = result.condition[None].to(device)
    torch.testing.assert_close(condition.cpu(), case["out.t2i.condition_z"], **CLOSE)

    shift = size_shift(config["C"], config["tokens_per_image"], config["diffusion_base_dim"])
    noise = case["in.t2i.x_end"].to(device)
    for scale, name in ((1.0, ""), (case.meta["cfg_scale"], "_cfg3")):
        null = model.head.null_condition.detach()
        model_fn = guided(model.head, condition, scale=scale, null_label=null)
        with torch.no_grad():
            latents = SizedFlow(shift).sample_ode(model_fn, noise, num_steps=51)
        expected = case[f"out.t2i.latents_target_to_zero{name}"]
        torch.testing.assert_close(to_tokens(latents)[0].cpu(), expected, **CLOSE)
