"""The text-to-image model: golden values of the joint forward pass, losses and gradients."""

from __future__ import annotations

import pytest
import torch
from golden_case import load_case
from text_to_image_cases import JointCase, load_joint
from torch import Tensor

from rae_xla.models.text_to_image.next_token import next_token_losses, supervised_tokens
from rae_xla.models.text_to_image.scale_rae import to_published
from rae_xla.models.text_to_image.slots import answers_first, find_slots, select_slots
from rae_xla.transport.losses import prediction_loss
from rae_xla.transport.paths import expand_like

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
CASES = ["query_a", "query_multi_image_k3_aux"]


def run(
    joint: JointCase, features: Tensor | None = None, drop: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the losses of a joint case; every slot of every row is an answer slot of the head."""
    case, model, flow, slots = joint.case, joint.model, joint.flow, joint.slots
    features = joint.features if features is None else features
    count = features.shape[1]
    slot, _ = answers_first(slots.answer, count)
    data, exists = model.answer_latents(features, slots, count)
    u, noise = (select_slots(joint.by_slot(name), slot) for name in ("in.u", "in.noise"))
    data = data[:, :, None].expand_as(noise)
    times = flow.times_from_normal(u)
    tx = expand_like(times, data)
    noisy = flow.path.interpolate(data, noise, tx)
    if drop is not None:
        drop = select_slots(drop.reshape(*slots.answer.shape, -1), slot)
    ids, labels = case["in.input_ids"], case["in.labels"]
    out = model(ids, labels, features, slots, noisy, times, drop)
    image_losses = prediction_loss(
        flow.path,
        "velocity",
        None,
        out.velocity,
        data.flatten(0, 2),
        noise.flatten(0, 2),
        times.flatten(),
    ).reshape(times.shape)
    image_losses = torch.where(exists, image_losses.mean(-1), 0.0)
    results = {
        "tokens": out.token_losses,
        "images": image_losses,
        "times": times,
        "ce": out.token_losses.sum() / supervised_tokens(labels).sum(),
        "diffusion": image_losses.sum() / exists.sum(),
    }
    if out.auxiliary is not None:
        results["aux"] = out.auxiliary.sum() / exists.sum()
    return results


@pytest.mark.parametrize("name", CASES)
def test_states_match_golden_values(name: str) -> None:
    joint = load_joint(name)
    case, model, slots = joint.case, joint.model, joint.slots
    assert torch.equal(slots.answer, case["in.answer_img_mask"])
    embeddings = model.embed(case["in.input_ids"], joint.features, slots)
    torch.testing.assert_close(embeddings, case["mid.inputs_embeds"], **CLOSE)
    hidden = model.language_model(embeddings)
    torch.testing.assert_close(hidden, case["out.hidden_states"], **CLOSE)
    logits = hidden[:, ::4] @ model.language_model.output_weight.T
    torch.testing.assert_close(logits, case["out.logits_every_4th"], **CLOSE)
    states = model.read_queries(hidden, slots)
    torch.testing.assert_close(states.flatten(0, 1), case["out.query_hidden"], **CLOSE)
    conditions = model.diff_head_projector(states).flatten(0, 1)
    conditions = conditions.repeat_interleave(joint.repeats, dim=0)
    torch.testing.assert_close(conditions, case["out.condition_z"], **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_match_golden_values(name: str) -> None:
    joint = load_joint(name)
    case, meta = joint.case, joint.case.meta
    results = run(joint)
    assert results["tokens"].tolist() == pytest.approx(meta["ce_sum_per_row"], rel=1e-5)
    counts = supervised_tokens(case["in.labels"])
    assert counts.tolist() == meta["ce_count_per_row"]
    assert results["ce"].item() == pytest.approx(meta["losses"]["ce"], rel=1e-5)
    assert results["diffusion"].item() == pytest.approx(meta["losses"]["diffusion"], rel=1e-5)
    recorded = joint.by_slot("out.diffusion_loss_per_image").mean(-1)[joint.slots.answer]
    torch.testing.assert_close(
        results["images"][results["images"] > 0].sort().values, recorded.sort().values, **CLOSE
    )
    total = results["ce"] + meta["config"]["vision_coef"] * results["diffusion"]
    if "aux" in results:
        expected = case["out.loss_aux"].item()
        assert results["aux"].item() == pytest.approx(expected, rel=1e-5)
        coefficient = (meta["losses"]["total"] - total.item()) / expected
        total = total + round(coefficient, 3) * results["aux"]
    assert total.item() == pytest.approx(meta["losses"]["total"], rel=1e-5)

    total.backward()
    gradients = {n: p.grad for n, p in joint.model.named_parameters() if p.grad is not None}
    norms = {n: g.norm().item() for n, g in to_published(gradients).items()}
    expected_norms = meta["grad_norms"]
    assert {n: norms[n] for n in expected_norms} == pytest.approx(
        expected_norms, rel=1e-3, abs=1e-6
    )


def test_dropped_conditions_match_golden_values() -> None:
    joint = load_joint("query_a")
    dropout = joint.case.meta["dropout"]
    results = run(joint, drop=joint.case["in.drop_u"] < dropout["prob"])
    assert results["diffusion"].item() == pytest.approx(dropout["losses"]["diffusion"], rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_answers_do_not_reach_the_language_model(name: str) -> None:
    joint = load_joint(name)
    ids = joint.case["in.input_ids"]
    embeddings = joint.model.embed(ids, joint.features, joint.slots)
    other = torch.where(joint.slots.answer[..., None, None], torch.nan, joint.features)
    assert torch.equal(joint.model.embed(ids, other, joint.slots), embeddings)


@pytest.mark.parametrize("name", CASES)
def test_unused_slots_do_not_reach_losses_or_gradients(name: str) -> None:
    joint = load_joint(name)

    def losses_and_gradients(features: Tensor) -> tuple[Tensor, list[Tensor]]:
        joint.model.zero_grad()
        results = run(joint, features)
        total = results["ce"] + results["diffusion"]
        total.backward()
        grads = [p.grad for p in joint.model.parameters() if p.grad is not None]
        return total.detach(), [grad.clone() for grad in grads]

    unused = ~joint.slots.present[..., None, None]
    assert unused.any()
    expected = losses_and_gradients(joint.features)
    actual = losses_and_gradients(torch.where(unused, torch.nan, joint.features))
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


def test_cross_entropy_in_chunks_is_the_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 10, 6, requires_grad=True)
    weight = torch.randn(17, 6, requires_grad=True)
    labels = torch.randint(17, (3, 10))
    labels[0, :4] = labels[2] = -100
    logits = hidden @ weight.T
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    ).sum(1)
    scale = torch.tensor([1.0, 0.5, 2.0])
    expected_grads = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
    losses, matches = next_token_losses(hidden, weight, labels, chunk=4)
    torch.testing.assert_close(losses, expected)
    grads = torch.autograd.grad((losses * scale).sum(), (hidden, weight))
    torch.testing.assert_close(grads, expected_grads)
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]).sum(1)
    assert torch.equal(matches, right.float())


@pytest.mark.parametrize("name", ["t2i", "vqa_image_first", "two_images_edit_M2", "text_only_M2"])
def test_slots_of_token_ids_match_golden_values(name: str) -> None:
    case = load_case("t2i/tokenization/cases")
    out = case.under(f"out.{name}")
    tokens = case.meta["tokens_per_image"]
    count = len(out["answer_img_mask"])
    slots = find_slots(out["input_ids"][None], out["labels"][None], count, tokens)
    assert torch.equal(slots.answer[0], out["answer_img_mask"])
    length = len(out["input_ids"])
    indices = torch.where(slots.is_image[0], length + slots.order[0], torch.arange(length))
    assert torch.equal(indices, out["vision_token_indices"])
    positions = slots.starts[0, :, None] + torch.arange(tokens)
    identity = torch.arange(count * tokens)
    gathered = torch.where(
        slots.present[0, :, None], count * tokens + positions, identity.reshape(count, tokens)
    )
    assert torch.equal(gathered.flatten(), out["reverse_vti"])
