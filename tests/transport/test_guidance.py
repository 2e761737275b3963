from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_case import Case, load_case
from torch import Tensor, nn
from torch.testing import assert_close
from transport.toy import toy_model

from rae_xla.errors import UserError
from rae_xla.models.dit import LightningDiT
from rae_xla.models.dit_dh import DiTDH
from rae_xla.transport import create_transport, guided

DDT = ("ddt_a_published", "ddt_b_qknorm", "ddt_c_layernorm_gelu")
LIGHTNING = ("lightningdit_a", "lightningdit_b_patch2")
FORWARD = {"rtol": 1e-4, "atol": 2e-5}


class Counter:
    """A toy model that remembers the rows it was given."""

    num_classes = 7

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((t, y))
        return self.gain * toy_model(x, t, y)

    @property
    def rows(self) -> int:
        return sum(len(y) for _, y in self.calls)


def load(case: Case, build: type[nn.Module], prefix: str = "") -> nn.Module:
    model = build(**case.meta[f"{prefix}config"])
    model.load_state_dict(case.under(f"{prefix}state"))
    return model.eval()


@pytest.mark.parametrize("name", DDT)
def test_classifier_free_guidance_has_the_recorded_values(name: str) -> None:
    case = load_case(f"stage2/{name}")
    model, null_label = load(case, DiTDH), case.meta["config"]["num_classes"]
    for call in case.meta["cfg_calls"]:
        x, t, y, out = (case[call[key]] for key in ("x", "t", "y", "out"))
        # The reference doubled the batch, labels [y; null], and uses the first half of x.
        half, scale = len(x) // 2, call["cfg_scale"]
        x, t, y, out = x[:half], t[:half], y[:half], out[:half]
        model_fn = guided(
            model, y, scale=scale, null_label=null_label, interval=tuple(call["cfg_interval"])
        )
        with torch.no_grad():
            if scale == 0:  # recorded as unconditional; here 1 or less is no guidance at all
                out = model(x, t, y)
            assert_close(model_fn(x, t), out, **FORWARD)
            for row, time in enumerate(t):
                by_time = model_fn.at(float(time))(x, time.expand(half))
                assert_close(by_time[row], out[row], **FORWARD)


@pytest.mark.parametrize("name", DDT)
def test_autoguidance_has_the_recorded_values(name: str) -> None:
    case = load_case(f"stage2/{name}")
    model, guide = load(case, DiTDH), load(case, DiTDH, "guide_")
    for call in case.meta["ag_calls"]:
        x, t, y, out = (case[call[key]] for key in ("x", "t", "y", "out"))
        model_fn = guided(
            model,
            y,
            scale=call["cfg_scale"],
            method="autoguidance",
            guide=guide,
            interval=tuple(call["cfg_interval"]),
        )
        with torch.no_grad():
            assert_close(model_fn(x, t), out, **FORWARD)


@pytest.mark.parametrize("name", LIGHTNING)
def test_guidance_of_lightningdit_has_the_recorded_values(name: str) -> None:
    """Its reference guides *outside* its interval, and may use a second scale inside."""
    case = load_case(f"stage2/{name}")
    model, guide = load(case, LightningDiT), load(case, LightningDiT, "guide_")
    half = len(case["in.x"]) // 2
    x, t, y = case["in.x"][:half], case["in.cfg_t"][:half], case["in.y"][:half]
    for call in case.meta["guidance_calls"]:
        # Compared in float32, as the reference does: 0.3 is then not below 0.3.
        spans = torch.tensor(call["cfg_interval"], dtype=torch.float32)
        inside = bool(((spans[:, 0] <= t[0]) & (t[0] < spans[:, 1])).any())
        scale = call["interval_cfg"] if inside else call["cfg_scale"]
        with torch.no_grad():
            cfg = guided(model, y, scale=scale, null_label=case.meta["config"]["num_classes"])
            assert_close(cfg(x, t), case[f"out.cfg.{call['i']}"][:half], **FORWARD)
            ag = guided(model, y, scale=scale, method="autoguidance", guide=guide)
            assert_close(ag(x, t), case[f"out.ag.{call['i']}"][:half], **FORWARD)


@pytest.mark.parametrize("method", ["cfg", "autoguidance"])
def test_no_branch_is_computed_and_thrown_away(method: str) -> None:
    x, y = torch.randn(4, 2, 3, 3), torch.tensor([0, 1, 2, 3])

    def rows_for(t: list[float], scale: float) -> tuple[int, int]:
        model, guide = Counter(), Counter(0.5)
        model_fn = guided(model, y, scale=scale, method=method, guide=guide, interval=(0.2, 0.6))
        model_fn(x, torch.tensor(t))
        return model.rows, guide.rows

    def both(model: int, weak: int) -> tuple[int, int]:
        return (model + weak, 0) if method == "cfg" else (model, weak)

    assert rows_for([0.9] * 4, 3.0) == both(4, 0)
    assert rows_for([0.4] * 4, 3.0) == both(4, 4)
    assert rows_for([0.1, 0.2, 0.6, 0.7], 3.0) == both(4, 2)
    assert rows_for([0.4] * 4, 1.0) == both(4, 0)
    assert rows_for([0.4] * 4, 0.0) == both(4, 0)


def test_mixed_times_give_each_row_what_it_would_get_alone() -> None:
    x, y = torch.randn(5, 2, 3, 3), torch.tensor([0, 1, 2, 3, 4])
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    for options in ({"method": "cfg"}, {"method": "autoguidance", "guide": Counter(0.5)}):
        together = guided(Counter(), y, scale=2.5, interval=(0.3, 0.7), **options)(x, t)
        for i in range(5):
            alone = guided(Counter(), y[i : i + 1], scale=2.5, interval=(0.3, 0.7), **options)
            assert_close(together[i : i + 1], alone(x[i : i + 1], t[i : i + 1]))


def test_a_bound_of_the_interval_is_inside_in_float32() -> None:
    x, y = torch.randn(2, 3), torch.tensor([0, 1])
    for bound in (0.1, 0.3, 0.7, 0.9):  # not all of these are below their float32 neighbour
        t = torch.full((2,), bound)
        for interval in ((bound, 1.0), (0.0, bound)):
            model_fn = guided(Counter(), y, scale=2.0, interval=interval)
            assert model_fn.at(float(t[0])) == model_fn.guided
            assert_close(model_fn(x, t), model_fn.guided(x, t), rtol=0, atol=0)


def test_the_null_label_defaults_to_the_models_own() -> None:
    model = Counter()
    guided(model, torch.tensor([0, 1]), scale=2.0)(torch.randn(2, 3), torch.tensor([0.5, 0.5]))
    assert sorted(torch.cat([y for _, y in model.calls]).tolist()) == [0, 1, 7, 7]


def test_the_null_label_of_a_model_that_does_not_say_is_imagenets() -> None:
    seen: list[int] = []

    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.extend(y.tolist())
        return x

    guided(model, torch.tensor([3]), scale=2.0)(torch.randn(1, 2), torch.tensor([0.5]))
    assert sorted(seen) == [3, 1000]


@pytest.mark.parametrize("method", ["euler", "heun", "dopri5"])
def test_a_sampler_guides_inside_the_interval_only(method: str) -> None:
    tr, x, y = (
        create_transport(time_dist_shift=3.0),
        torch.randn(3, 2, 2, 2),
        torch.tensor([0, 1, 2]),
    )
    model = Counter()
    model_fn = guided(model, y, scale=2.0, interval=(0.3, 0.8))
    tr.sample_ode(model_fn, x, method=method, num_steps=8)
    assert {len(t) for t, _ in model.calls} == {3, 6}
    for t, _ in model.calls:
        assert (len(t) == 6) == (0.3 <= float(t[0]) <= 0.8)


def bad(**options: Any) -> None:
    guided(lambda x, t, y: x, torch.tensor([0]), **({"scale": 2.0, "null_label": 3} | options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "apg"}, "guidance method: 'apg' is not one of cfg, autoguidance"),
        ({"method": "autoguidance"}, "needs a guide model"),
        ({"interval": (0.5, 0.5)}, "t_min must be below t_max"),
        ({"scale": float("nan")}, "guidance scale"),
    ],
)
def test_what_cannot_guide_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        bad(**options)


def test_labels_for_another_batch_are_refused() -> None:
    model_fn = guided(Counter(), torch.tensor([0, 1]), scale=2.0)
    with pytest.raises(UserError, match="2 labels were bound, but x has 3 rows"):
        model_fn(torch.randn(3, 2), torch.zeros(3))
