"""One process on plain torch."""

import pytest
import torch
from torch import nn

from rae_xla.config import MeshConfig
from rae_xla.config.sections import IciMesh, RuntimeConfig
from rae_xla.errors import UserError
from rae_xla.models.dit_dh import DiTDH
from rae_xla.runtime import start


def gradients(remat):
    torch.manual_seed(0)
    model = DiTDH(2, 1, 8, [32, 48], [2, 1], [4, 4], num_classes=4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    runtime = start(RuntimeConfig(backend="torch", remat=remat), MeshConfig())
    runtime.place(runtime.place(model.train()))
    kept = []
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor.numel())
        return tensor

    x, t, y = torch.randn(2, 8, 2, 2), torch.tensor([0.2, 0.7]), torch.tensor([0, 3])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x, t, y, label_drop=torch.zeros(2, dtype=torch.bool)).square().sum()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, sum(kept), list(model.state_dict())


def test_rematerialised_blocks_keep_less_and_change_no_gradient():
    whole, all_kept, names = gradients(0.0)
    again, less_kept, same_names = gradients(1.0)
    assert less_kept < 0.5 * all_kept
    assert same_names == names
    for name, gradient in whole.items():
        assert (gradient is None) == (again[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-8)


def test_a_machine_with_more_gpus_is_told_how_to_use_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    settings = RuntimeConfig(backend="torch")
    told = r"torchrun --nproc-per-node 8 -m rae_xla"
    assert told in start(settings, MeshConfig()).description
    with pytest.raises(UserError, match=rf"does not make the 1 devices.*{told}"):
        start(settings, MeshConfig(ici=IciMesh(fsdp=8)))


def test_flash_attention_is_not_of_this_backend():
    with pytest.raises(UserError, match=r"runtime.attention is flash.*TPUs alone"):
        start(RuntimeConfig(backend="torch", attention="flash"), MeshConfig())
