"""State dicts inside of checkpoints and under the prefixes of wrapper modules."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from rae_xla.errors import UserError
from rae_xla.models.pretrained.selected_weights import select_weights

STATE = {"a.weight": torch.ones(2), "b.0.bias": torch.zeros(1)}


def prefixed(prefix):
    return {prefix + name: tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "module.module."],
)
@pytest.mark.parametrize("wrap", ["bare", "ema", "model", "state_dict"])
def test_every_wrapper_in_every_container(prefix, wrap):
    content = prefixed(prefix)
    if wrap != "bare":
        content = {wrap: content, "step": 3}
    part = wrap if wrap in ("ema", "model") else "ema"
    selected = select_weights(content, "f.pt", part)
    assert selected.state == STATE
    assert selected.part == (wrap if wrap in ("ema", "model") else None)


def test_wrappers_of_inner_modules():
    state = {
        "a._orig_mod.weight": STATE["a.weight"],
        "b._fsdp_wrapped_module.0.bias": STATE["b.0.bias"],
    }
    assert select_weights(state, "f.pt").state == STATE


def test_average_of_torch():
    model = nn.Sequential(nn.Linear(2, 2))
    state = AveragedModel(model).state_dict()
    assert "n_averaged" in state
    assert select_weights(state, "f.pt").state.keys() == model.state_dict().keys()


def test_part_and_configuration_of_a_checkpoint():
    content = {"step": 7, "model": STATE, "ema": prefixed("module."), "config": {"stage_1": {}}}
    for part in ("model", "ema"):
        selected = select_weights(content, "f.pt", part)
        assert selected.state == STATE
        assert selected.container == f"training checkpoint of step 7, {part} weights"
        assert selected.config == {"stage_1": {}}
    with pytest.raises(UserError, match=r"f\.pt has no 'disc' weights; it has model, ema"):
        select_weights(content, "f.pt", "disc")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds a list"),
        ({}, "holds a dict, no weights"),
        ({"model": STATE}, "has no 'ema' weights; it has model.*--weights model"),
        ({"model": {}, "ema": {}}, "has no 'ema' weights; it has no others"),
        ({"ema": {"a": 1}}, "'ema' in f.pt is not a state dict: no tensors at a"),
        ({**STATE, "lr": 0.1}, "no tensors at lr"),
        ({**STATE, "_orig_mod.a.weight": torch.ones(2)}, "it holds weights twice"),
    ],
)
def test_what_is_not_weights(content, message):
    with pytest.raises(UserError, match=message):
        select_weights(content, "f.pt")


def test_a_module_named_module_is_kept():
    state = {"module.weight": torch.ones(1), "other.weight": torch.ones(1)}
    assert select_weights(state, "f.pt").state == state
