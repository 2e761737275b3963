"""Generation from prompts: golden text, conditions and latents, with and without cache, batches."""

from __future__ import annotations

import pytest
import torch
from golden_case import Case, load_case
from text_to_image_cases import build_model

from rae_xla.errors import UserError
from rae_xla.models.text_to_image.generation import StopTokens, generate, image_conditions
from rae_xla.models.text_to_image.latents import to_tokens
from rae_xla.models.text_to_image.model import TextToImageModel
from rae_xla.transport import guided
from rae_xla.transport.sized_flow import SizedFlow, size_shift

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def case() -> Case:
    return load_case("t2i/generate/greedy_t2i")


@pytest.fixture(scope="module")
def model(case: Case) -> TextToImageModel:
    meta = case.meta
    return build_model(
        case, tokens=meta["config"]["tokens_per_image"], channels=meta["config"]["C"]
    )


def stop_tokens(case: Case, *, with_images: bool = True) -> StopTokens:
    ids = case.meta["special_ids"]
    return StopTokens(ids["eos"], ids["im_start"] if with_images else None)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_prompt_gives_the_golden_text_and_latents(
    case: Case, model: TextToImageModel, batch: int, use_cache: bool
) -> None:
    prompt = case["in.t2i.input_ids"].tolist()
    # Other prompts of other lengths, which end at other steps.
    others = [prompt[: 20 + 3 * i] for i in range(batch - 1)]
    results = generate(
        model,
        [prompt, *others],
        stop_tokens(case),
        max_new_tokens=case.meta["max_new_tokens"]["t2i"],
        use_cache=use_cache,
    )
    assert results[0].ids == case["out.t2i.generated_ids"].tolist()
    condition = results[0].condition
    assert condition is not None
    torch.testing.assert_close(condition[None], case["out.t2i.condition_z"], **CLOSE)

    config = case.meta["config"]
    shift = size_shift(config["C"], config["tokens_per_image"], config["diffusion_base_dim"])
    for scale, name in ((1.0, ""), (case.meta["cfg_scale"], "_cfg3")):
        null = model.head.null_condition.detach()
        model_fn = guided(model.head, condition[None], scale=scale, null_label=null)
        latents = SizedFlow(shift).sample_ode(model_fn, case["in.t2i.x_end"], num_steps=51)
        expected = case[f"out.t2i.latents_target_to_zero{name}"]
        torch.testing.assert_close(to_tokens(latents)[0], expected, **CLOSE)


def test_prompt_alone_equals_prompt_in_a_batch(case: Case, model: TextToImageModel) -> None:
    prompt = case["in.t2i.input_ids"].tolist()
    prompts = [prompt[:n] for n in (52, 30, 41)]
    together = generate(model, prompts, stop_tokens(case), max_new_tokens=12)
    for prompt, result in zip(prompts, together, strict=True):
        [alone] = generate(model, [prompt], stop_tokens(case), max_new_tokens=12)
        assert alone.ids == result.ids
        assert (alone.condition is None) == (result.condition is None)


def test_text_ends_after_the_given_number_of_tokens(case: Case, model: TextToImageModel) -> None:
    count = case.meta["max_new_tokens"]["text8"]
    prompt = case["in.t2i.input_ids"].tolist()
    [result] = generate(model, [prompt], stop_tokens(case), max_new_tokens=count)
    assert result.ids == case["out.text8.generated_ids"].tolist()[:count]
    assert result.condition is None


@pytest.mark.parametrize("use_cache", [True, False])
def test_question_about_an_image_gives_the_golden_answer(
    case: Case, model: TextToImageModel, use_cache: bool
) -> None:
    [result] = generate(
        model,
        [case["in.vqa.input_ids"].tolist()],
        stop_tokens(case, with_images=False),
        features=[case["in.vqa.image_features"]],
        max_new_tokens=case.meta["max_new_tokens"]["vqa"],
        use_cache=use_cache,
    )
    assert result.ids == case["out.vqa.generated_ids_fp32"].tolist()[:10]


def test_conditions_of_an_image_that_follows_at_once(case: Case, model: TextToImageModel) -> None:
    text = case["in.t2i.input_ids"].tolist() + case["out.t2i.generated_ids"].tolist()
    conditions = image_conditions(model, [text, text[3:]])
    torch.testing.assert_close(conditions[:1], case["out.t2i.condition_z"], **CLOSE)


def test_images_and_placeholders_must_agree(case: Case, model: TextToImageModel) -> None:
    with pytest.raises(UserError, match="1 <image> placeholders, but 0 images"):
        generate(model, [case["in.vqa.input_ids"].tolist()], stop_tokens(case))
