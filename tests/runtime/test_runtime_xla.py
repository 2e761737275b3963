"""The XLA backend on four virtual devices: where tensors lie, and what compiles."""

import copy

import pytest
import torch
from torch import nn

from rae_xla.config import MeshConfig, RunConfig, RuntimeConfig
from rae_xla.config.sections import IciMesh
from rae_xla.errors import UserError
from rae_xla.models import attention as attentions
from rae_xla.models.dino_vit import DINOShape, DINOViT
from rae_xla.models.discriminator import DinoDiscriminator
from rae_xla.models.dit_dh import DiTDH
from rae_xla.models.lpips import LPIPS
from rae_xla.runtime import start
from rae_xla.train.state import MOMENTS, make_state, update_ema

pytestmark = pytest.mark.xla


# Of the small models here; a matrix that does not divide stays whole.
RULES = """
networks: [Small]
parameters:
  - {pattern: 'weight$', spec: [fsdp]}
"""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    rules = tmp_path_factory.mktemp("rules") / "small.yaml"
    rules.write_text(RULES)
    config = RunConfig(
        mesh=MeshConfig(IciMesh(data=2, fsdp=2), sharding=("configs/sharding", str(rules))),
        runtime=RuntimeConfig(backend="xla", devices=4, remat=0.5),
    )
    return start(config.runtime, config.mesh)


class Small(nn.Sequential):
    pass


def small_model():
    return Small(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 4))


def sharding(tensor):
    import torch_xla

    return torch_xla._XLAC._get_xla_sharding_spec(tensor)


def test_parameters_moments_and_averages_are_split_alike(runtime):
    state = make_state(small_model(), runtime)
    split = sharding(state.model.module[0].weight)
    assert "devices=[2,1,2]" in split
    assert "last_tile_dim_replicate" in split
    averages = dict(state.ema.named_parameters())
    for name, parameter in state.model.parameters().items():
        copies = [averages[name], *(state.model.moments[m][name] for m in MOMENTS)]
        assert {sharding(copy) for copy in copies} == {sharding(parameter)}, name


def test_a_discriminator_is_split_and_the_frozen_networks_are_whole(runtime):
    shape = DINOShape(depth=1, embed_dim=32, num_heads=2, patch_size=32)
    disc = DinoDiscriminator(DINOViT(shape), ks=3)
    state = make_state(small_model(), runtime, disc=disc)
    runtime.place(nn.ModuleDict({"backbone": disc.backbone, "lpips": LPIPS()}))
    conv = disc.heads[0][0][0]
    assert "devices=[2,1,1,2]" in sharding(conv.weight_orig)
    for moment in MOMENTS:
        split = sharding(state.disc.moments[moment]["heads.0.0.0.weight_orig"])
        assert split == sharding(conv.weight_orig)
    whole = (conv.weight_u, disc.backbone.blocks[0].attn.qkv.weight)
    assert not any("devices=" in sharding(tensor) for tensor in whole)
    back = runtime.to_host(disc.state_dict())
    assert back.keys() == disc.state_dict().keys()


def test_what_is_put_comes_back(runtime):
    model = Small(nn.Linear(6, 8), nn.Linear(5, 3))
    tensors = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    back = runtime.to_host(runtime.place_tensors(tensors, like=model))
    rows = {"image": torch.randint(256, (8, 3, 2, 2), dtype=torch.uint8), "step": torch.tensor(1)}
    back |= runtime.to_host(runtime.put(rows))
    for name, tensor in (tensors | rows).items():
        assert torch.equal(back[name], tensor), name


def test_placing_again_leaves_what_is_placed(runtime):
    model = small_model()
    runtime.place(Small(model[0]))
    held = model[0].weight
    runtime.place(model)
    assert model[0].weight is held
    assert model[2].weight.device == runtime.device


def test_blocks_that_forget_their_activations_give_the_same_gradients(runtime):
    """Half of the blocks, the head's conditions come through their gradients."""
    sizes = {"input_size": 4, "in_channels": 8, "hidden_size": (16, 24), "depth": (3, 1)}
    plain = DiTDH(**sizes, num_heads=2, num_classes=4).train()
    for parameter in filter(lambda p: p.requires_grad, plain.parameters()):
        nn.init.normal_(parameter, std=0.1)
    model = runtime.place(copy.deepcopy(plain))
    assert [hasattr(block, "recompute") for block in model.blocks] == [False, True, False, True]
    names = [name for name, p in plain.named_parameters() if p.requires_grad]
    batch = {"x": torch.randn(8, 8, 4, 4), "t": torch.rand(8), "y": torch.arange(8) % 4}

    def gradients(net, x, t, y):
        loss = net(x, t, y, label_drop=y > 2).square().mean()
        return [loss, *torch.autograd.grad(loss, [dict(net.named_parameters())[n] for n in names])]

    @runtime.compile
    def on_devices(batch):
        return gradients(model, **batch)

    found = on_devices(runtime.put(batch))
    host = runtime.to_host(dict(zip(["loss", *names], found, strict=True)))
    expected = dict(zip(["loss", *names], gradients(plain, **batch), strict=True))
    torch.testing.assert_close(host, expected, rtol=1e-4, atol=1e-6)
    split = sharding(found[1 + names.index("blocks.1.mlp.w12.weight")])
    assert "devices=" in split  # a gradient comes back in parts: it is scattered, not summed


def test_a_function_compiles_once_whatever_the_numbers(runtime):
    state = make_state(small_model(), runtime)

    @runtime.compile
    def step(batch):
        loss = (state.model.module(batch["x"]) * batch["lr"]).square().mean()
        update_ema(state.ema, state.model.module, 0.9)
        return torch.stack([loss, batch["step"] + 0.0])

    runtime.synchronize()
    before = runtime.compilations()
    for number in (0, 1, 2, 5):
        host = {
            "x": torch.randn(8, 6),
            "lr": torch.tensor(number / 2),
            "step": torch.tensor(number),
        }
        [result] = runtime.fetch([step(runtime.put(host))])
        assert result[1] == number
    assert runtime.compilations() == before + 1
    assert runtime.fallbacks() == {}


def test_leaving_the_graph_inside_a_compiled_function_is_an_error(runtime):
    @runtime.compile
    def step(batch):
        return batch["x"] + float(batch["x"].sum())

    with pytest.raises(RuntimeError):
        step(runtime.put({"x": torch.randn(4, 2)}))
    double = runtime.compile(lambda batch: batch["x"] * 2)
    host = torch.randn(4, 2)
    torch.testing.assert_close(
        runtime.to_host({"y": double(runtime.put({"x": host}))})["y"], host * 2
    )


@pytest.mark.slow
def test_a_loop_over_blocks_has_one_block_for_each_direction(runtime, monkeypatch):
    import torch_xla

    monkeypatch.setattr(runtime, "_scan", True)
    monkeypatch.setattr(runtime, "_remat", 0.0)
    products = []
    for depth in (3, 6):
        sizes = {"input_size": 4, "in_channels": 8, "hidden_size": (16, 24), "depth": (depth, 1)}
        model = runtime.place(DiTDH(**sizes, num_heads=2, num_classes=4).train())
        batch = {"x": torch.randn(8, 8, 4, 4), "t": torch.rand(8), "y": torch.arange(8) % 4}
        placed = runtime.put(batch)
        loss = model(**placed, label_drop=placed["y"] > 2).square().mean()
        trained = [p for p in model.parameters() if p.requires_grad]
        text = torch_xla._XLAC._get_xla_tensors_hlo([*torch.autograd.grad(loss, trained)])
        assert text.count(" while(") == 2
        products.append(text.count(" dot("))
    assert products[0] == products[1] > 0


@pytest.fixture
def kernels(runtime):
    """The flash kernels' arithmetic on the CPU, from 128 tokens on."""
    pytest.importorskip("jax")
    from rae_xla.runtime.xla_flash import FlashAttention, use_flash

    flash = FlashAttention(runtime._mesh, runtime.mesh, 128, interpret=True)
    use_flash(flash)
    yield flash
    use_flash(None)


def heads(tokens, channels):
    return [torch.randn(4, 2, tokens, channels) for _ in range(4)]


@pytest.mark.slow
def test_flash_attention_is_attention(runtime, kernels):
    """Forward and backward, each device on its rows; 24 channels are not what a kernel takes."""
    query, key, value, weight = heads(128, 24)

    def run(query, key, value, weight):
        given = [t.detach().clone().requires_grad_() for t in (query, key, value)]
        mixed = attentions.attention(*given)
        with torch.no_grad():
            again = attentions.attention(*given)
        return [mixed, again, *torch.autograd.grad(mixed, given, weight)]

    placed = runtime.put({"query": query, "key": key, "value": value, "weight": weight})
    found = runtime.compile(lambda batch: run(**batch))(placed)
    assert sharding(found[0]) == sharding(placed["query"])
    expected = run(query, key, value, weight)
    host = runtime.to_host({str(i): tensor for i, tensor in enumerate(found)})
    torch.testing.assert_close(list(host.values()), expected, rtol=1e-5, atol=2e-6)


def test_what_the_flash_kernels_cannot_do_is_left_to_plain_attention(runtime, kernels):
    for tokens in (64, 200):
        query, key, value, _ = heads(tokens, 8)
        assert kernels(query, key, value) is None
    query, key, value, _ = heads(128, 8)
    assert kernels(query, key[:, :, :64], value[:, :, :64]) is None
    assert kernels(query[:3], key[:3], value[:3]) is None  # rows for four devices


def test_flash_attention_is_for_long_rows_on_a_tpu():
    from rae_xla.runtime.xla_flash import JAX, LONG, _version, tokens_from

    assert tokens_from("auto", "bf16", tpu=False) is None
    assert tokens_from("plain", "bf16", tpu=True) is None
    assert tokens_from("auto", "fp32", tpu=True) is None
    with pytest.raises(UserError, match="TPUs alone"):
        tokens_from("flash", "bf16", tpu=False)
    if _version("jax") == JAX:
        assert tokens_from("auto", "bf16", tpu=True) == LONG
        assert tokens_from("flash", "bf16", tpu=True) == 0
        with pytest.raises(UserError, match="precision"):
            tokens_from("flash", "fp32", tpu=True)
    else:
        assert tokens_from("auto", "bf16", tpu=True) is None
