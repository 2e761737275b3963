"""Heads that attend to a context, and the tokens of prompts as their context (RAEv2)."""

from __future__ import annotations

import pytest
import torch
from golden_case import Case, load_case
from text_to_image_cases import LANGUAGE_MODELS, PROMPT_LENGTH, prompts, tiny_model

from rae_xla.errors import UserError
from rae_xla.models.pretrained.dit_layouts import from_raev2, to_raev2
from rae_xla.models.text_to_image.context import context_bias, pack_context
from rae_xla.models.text_to_image.in_context import InContextDiT
from rae_xla.models.text_to_image.settings import HeadSettings, PromptReading
from rae_xla.models.text_to_image.slots import PADDING

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
INJECTED = ["in-context", "cross-attention"]


def published(case: Case) -> tuple[InContextDiT, torch.Tensor]:
    """Return the model of a golden case, and its context in our form."""
    config = case.meta["config"]
    model = InContextDiT(
        config["input_size"],
        config["in_channels"],
        config["context_dim"],
        config["cond_arch"]["num_c_tokens"],
        config["hidden_size"],
        config["depth"],
        config["num_heads"],
        config["cond_arch"]["num_t_tokens"],
        config["base_model_depth"],
    )
    model.load_state_dict(from_raev2(case.under("state")))
    return model, pack_context(case["in.context"], case["in.attn_mask"] == 0)


def test_text_conditioned_head_matches_golden_values_and_gradients() -> None:
    case = load_case("raev2/stage2/ddt_ig_text")
    model, context = published(case)
    found = model(case["in.x"], case["in.t"], context, all_outputs=True)
    torch.testing.assert_close(found.full, case["out.full"], **CLOSE)
    torch.testing.assert_close(found.base, case["out.base"], **CLOSE)
    parts = (found.full * case["in.cotangent_full"], found.base * case["in.cotangent_base"])
    loss = sum(part.mean() for part in parts)
    loss.backward()
    assert loss.item() == pytest.approx(case.meta["loss_value"], rel=1e-4)
    gradients = to_raev2({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    assert norms == pytest.approx(case.meta["grad_norms"], rel=1e-3, abs=1e-9)


def test_text_conditioned_head_has_the_published_keys() -> None:
    meta = load_case("raev2/keymaps/DiTDH-XL-IG_t2i_dinov3l").meta
    with torch.device("meta"):
        model = InContextDiT()
    keys = {name: list(tensor.shape) for name, tensor in to_raev2(model.state_dict()).items()}
    assert keys == meta["keys"]
    assert sum(p.numel() for p in model.parameters()) == meta["parameters"]


@pytest.mark.parametrize("inject", INJECTED)
def test_padding_does_not_reach_the_prediction(inject: str) -> None:
    head = tiny_model(inject=inject).head
    x, t, padding = torch.randn(2, 3, 2, 2), torch.rand(2), torch.arange(PROMPT_LENGTH) >= 4
    context = pack_context(torch.randn(2, PROMPT_LENGTH, 16), padding.expand(2, -1))
    other = torch.where(padding[:, None] & (torch.arange(17) < 16), 7.0, context)
    expected = head(x, t, context)
    torch.testing.assert_close(head(x, t, other), expected)
    changed = context.index_copy(1, torch.tensor([3]), torch.randn(2, 1, 17).abs() + 1)
    assert not torch.allclose(head(x, t, changed), expected)


def test_bias_masks_padding_alone() -> None:
    context = pack_context(torch.ones(1, 3, 2), torch.tensor([[False, True, True]]))
    assert (context_bias(context, 2) == 0).tolist() == [[[[True, True, True, False, False]]]]


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_layers_of_the_prompt_are_stacked_or_averaged(kind: str) -> None:
    ids = prompts()
    layers, kept = (1, -1), ids[:, 2:] != PADDING
    padding = ids == PADDING
    reading = PromptReading(PROMPT_LENGTH, dropped=2, layers=layers)
    model = tiny_model(kind, prompt=reading)
    states = model.language_model.layer_states(torch.where(padding, 0, ids), padding, layers)
    first, last = (part[:, 2:] for part in states)
    found = model.read_prompts(ids)
    assert torch.equal(found[..., -1].bool(), kept)
    torch.testing.assert_close(found[..., :-1][kept], torch.cat([first, last], -1)[kept])
    assert found[..., :-1][~kept].abs().max() == 0
    averaged = tiny_model(kind, prompt=PromptReading(PROMPT_LENGTH, 2, layers, average=True))
    vectors = averaged.read_prompts(ids)[..., :-1]
    torch.testing.assert_close(vectors[kept], ((first + last) / 2)[kept])


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("inject", INJECTED)
def test_rows_do_not_depend_on_each_other(kind: str, inject: str) -> None:
    model = tiny_model(kind, inject)
    ids = prompts()
    noisy, times = torch.randn(3, 1, 2, 3, 2, 2), torch.rand(3, 1, 2)

    def predict(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        own = ids[rows]
        slots = model.slots(own, own, 1)
        assert slots.answer.all()
        features = torch.zeros(len(own), 1, 4, 3)
        out = model(own, own, features, slots, noisy[rows], times[rows], None)
        assert out.token_losses.tolist() == [0.0] * len(own)
        assert out.base is not None
        return out.velocity, out.base

    together = predict(slice(3))
    alone = [predict(slice(i, i + 1)) for i in range(3)]
    for i, whole in enumerate(together):
        assert whole.isfinite().all()  # also where the prompt is empty
        torch.testing.assert_close(torch.cat([row[i] for row in alone]), whole, **CLOSE)


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_reach_a_trained_language_model_alone(trained: bool) -> None:
    model = tiny_model()
    model.language_model.requires_grad_(trained)
    context = model.read_prompts(prompts())
    assert context.requires_grad == trained


@pytest.mark.parametrize("inject", INJECTED)
def test_queries_may_be_a_context_with_a_learned_null(inject: str) -> None:
    model = tiny_model(inject=inject, prompt=None)
    null = model.null_condition()
    assert null is not None
    states = torch.randn(2, 4, 16)
    kept, dropped = model.conditions(states, torch.tensor([False, True]))
    torch.testing.assert_close(kept, model.conditions(states)[0])
    torch.testing.assert_close(dropped, null.expand_as(dropped))
    unguided = tiny_model(inject=inject, prompt=None, condition_dropout_prob=0.0)
    with pytest.raises(UserError, match="without condition dropout"):
        unguided.null_condition()


def test_settings_survive_json_and_are_checked() -> None:
    import json

    settings = tiny_model().settings
    assert HeadSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(UserError, match="read: queries"):
        HeadSettings(prompt=PromptReading())
    with pytest.raises(UserError, match="no base head"):
        HeadSettings(base_model_depth=2)
    with pytest.raises(UserError, match="not one of per-token"):
        HeadSettings(inject="context")
    with pytest.raises(UserError, match="another version"):
        HeadSettings.from_dict({"unknown": 1})
