"""The torch backend on one process."""

import pytest
import torch
from torch import nn

from rae_xla.config import MeshConfig
from rae_xla.config.schema import IciMesh, RuntimeConfig
from rae_xla.errors import UserError
from rae_xla.models.dit_dh import DiTDH
from rae_xla.runtime import start


def gradients(remat):
    torch.manual_seed(0)
    model = DiTDH(2, 1, 8, [32, 48], [2, 1], [4, 4], num_classes=4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    backend = start(RuntimeConfig(backend="torch", remat=remat), MeshConfig())
    backend.place(backend.place(model.train()))
    saved = []
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def record(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.append(tensor.numel())
        return tensor

    x, t, y = torch.randn(2, 8, 2, 2), torch.tensor([0.2, 0.7]), torch.tensor([0, 3])
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = model(x, t, y, label_drop=torch.zeros(2, dtype=torch.bool)).square().sum()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, sum(saved), list(model.state_dict())


def test_rematerialised_blocks_save_less_and_change_no_gradient():
    expected, saved, names = gradients(0.0)
    found, saved_with_remat, same_names = gradients(1.0)
    assert saved_with_remat < 0.5 * saved
    assert same_names == names
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8)


def test_a_machine_with_several_accelerators_gets_a_hint_of_torchrun(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    settings = RuntimeConfig(backend="torch")
    hint = r"torchrun --nproc-per-node 8 -m rae_xla"
    assert hint in start(settings, MeshConfig()).description
    with pytest.raises(UserError, match=rf"mesh: .*1 devices.*{hint}"):
        start(settings, MeshConfig(ici=IciMesh(fsdp=8)))


def test_networks_of_metrics_compute_without_tf32_in_a_bf16_run():
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]

    def allowed() -> list[bool]:
        return [flag.allow_tf32 for flag in flags]

    try:
        for flag in flags:
            flag.allow_tf32 = True
        backend = start(RuntimeConfig(backend="torch", precision="bf16"), MeshConfig())
        assert allowed() == [True, True]
        with backend.full_float32():
            assert allowed() == [False, False]
        assert allowed() == [True, True]
        start(RuntimeConfig(backend="torch", precision="fp32"), MeshConfig())
        assert allowed() == [False, False]
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def test_flash_attention_is_refused():
    with pytest.raises(UserError, match=r"runtime.attention is flash.*TPUs"):
        start(RuntimeConfig(backend="torch", attention="flash"), MeshConfig())
