"""The XLA backend on four virtual devices: sharding, copies, and what compiles."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from rae_xla.checkpoint.train_state import MOMENTS, make_state
from rae_xla.config import MeshConfig, RunConfig, RuntimeConfig
from rae_xla.config.schema import IciMesh
from rae_xla.errors import UserError
from rae_xla.models.dino_vit import DINOViT, DINOViTConfig
from rae_xla.models.discriminator import DinoDiscriminator
from rae_xla.models.dit_dh import DiTDH
from rae_xla.models.lpips import LPIPS
from rae_xla.ops import dispatch
from rae_xla.ops.attention import attention
from rae_xla.ops.rotary import rotary_attention
from rae_xla.runtime import start
from rae_xla.train.ema import update_ema

pytestmark = pytest.mark.xla


# Rules of the small models here; a matrix that does not divide is replicated.
RULES = """
networks: [Small]
parameters:
  - {pattern: 'weight$', spec: [fsdp]}
"""


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
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
    from rae_xla.runtime.xla import compat

    return compat.sharding_text(tensor)


def test_parameters_moments_and_averages_are_sharded_alike(backend):
    state = make_state(small_model(), backend, average_widths=(0.05, 0.1))
    split = sharding(state.model.module[0].weight)
    assert "devices=[2,1,2]" in split
    assert "last_tile_dim_replicate" in split
    averages = dict(state.ema.named_parameters())
    for name, parameter in state.model.parameters().items():
        copies = [averages[name], *(state.model.moments[m][name] for m in MOMENTS)]
        copies += [of_width[name] for of_width in state.averages.values()]
        assert {sharding(copy) for copy in copies} == {sharding(parameter)}, name


def test_a_discriminator_is_sharded_and_frozen_networks_are_replicated(backend):
    shape = DINOViTConfig(depth=1, embed_dim=32, num_heads=2, patch_size=32)
    disc = DinoDiscriminator(DINOViT(shape), ks=3)
    state = make_state(small_model(), backend, disc=disc)
    backend.place(nn.ModuleDict({"backbone": disc.backbone, "lpips": LPIPS()}))
    conv = disc.heads[0][0][0]
    assert "devices=[2,1,1,2]" in sharding(conv.weight_orig)
    for moment in MOMENTS:
        split = sharding(state.disc.moments[moment]["heads.0.0.0.weight_orig"])
        assert split == sharding(conv.weight_orig)
    replicated = (conv.weight_u, disc.backbone.blocks[0].attn.qkv.weight)
    assert not any("devices=" in sharding(tensor) for tensor in replicated)
    back = backend.to_host(disc.state_dict())
    assert back.keys() == disc.state_dict().keys()


def test_tensors_return_from_the_devices_unchanged(backend):
    model = Small(nn.Linear(6, 8), nn.Linear(5, 3))
    tensors = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    back = backend.to_host(backend.place_tensors(tensors, like=model))
    rows = {"image": torch.randint(256, (8, 3, 2, 2), dtype=torch.uint8), "step": torch.tensor(1)}
    back |= backend.to_host(backend.shard_batch(rows))
    for name, tensor in (tensors | rows).items():
        assert torch.equal(back[name], tensor), name


def test_placing_again_keeps_placed_parameters(backend):
    model = small_model()
    backend.place(Small(model[0]))
    weight = model[0].weight
    backend.place(model)
    assert model[0].weight is weight
    assert model[2].weight.device == backend.device


def test_a_model_that_is_no_longer_used_is_freed(backend):
    """As at a rollback, which places new models in the same process."""
    from rae_xla.runtime.xla.linear import ShardedLinear

    def place():
        sizes = {"input_size": 4, "in_channels": 8, "hidden_size": (16, 24), "depth": (2, 1)}
        return backend.place(DiTDH(**sizes, num_heads=2, num_classes=4).train())

    def count_layers():
        gc.collect()
        return sum(type(o) is ShardedLinear for o in gc.get_objects())

    before = count_layers()
    model = place()
    layers, freed = count_layers() - before, weakref.ref(model)
    assert layers > 0
    model = place()
    assert count_layers() - before == layers
    assert freed() is None
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch", "rae_xla"}
    assert type(model.blocks[0].attn.proj) is nn.Linear  # placing replaces no class


def test_rematerialised_blocks_give_the_same_gradients(backend):
    """Half of the blocks; the conditioning of the head gets its gradient through them."""
    sizes = {"input_size": 4, "in_channels": 8, "hidden_size": (16, 24), "depth": (3, 1)}
    plain = DiTDH(**sizes, num_heads=2, num_classes=4).train()
    for parameter in filter(lambda p: p.requires_grad, plain.parameters()):
        nn.init.normal_(parameter, std=0.1)
    model = backend.place(copy.deepcopy(plain))
    assert ["forward" in vars(block) for block in model.blocks] == [False, True, False, True]
    names = [name for name, p in plain.named_parameters() if p.requires_grad]
    batch = {"x": torch.randn(8, 8, 4, 4), "t": torch.rand(8), "y": torch.arange(8) % 4}

    def gradients(net, x, t, y):
        loss = net(x, t, y, label_drop=y > 2).square().mean()
        return [loss, *torch.autograd.grad(loss, [dict(net.named_parameters())[n] for n in names])]

    @backend.compile
    def on_devices(batch):
        return gradients(model, **batch)

    found = on_devices(backend.shard_batch(batch))
    host = backend.to_host(dict(zip(["loss", *names], found, strict=True)))
    expected = dict(zip(["loss", *names], gradients(plain, **batch), strict=True))
    torch.testing.assert_close(host, expected, rtol=1e-4, atol=1e-6)
    split = sharding(found[1 + names.index("blocks.1.mlp.w12.weight")])
    assert "devices=" in split  # the gradient is reduce-scattered, not all-reduced


def test_a_function_compiles_once_for_all_values(backend):
    state = make_state(small_model(), backend)

    @backend.compile
    def step(batch):
        loss = (state.model.module(batch["x"]) * batch["lr"]).square().mean()
        update_ema(state.ema, state.model.module, 0.9)
        return torch.stack([loss, batch["step"] + 0.0])

    backend.synchronize()
    before = backend.compilations()
    for number in (0, 1, 2, 5):
        host = {
            "x": torch.randn(8, 6),
            "lr": torch.tensor(number / 2),
            "step": torch.tensor(number),
        }
        [result] = backend.fetch([step(backend.shard_batch(host))])
        assert result[1] == number
    assert backend.compilations() == before + 1
    assert backend.fallbacks() == {}


def test_reading_a_result_inside_a_compiled_function_is_an_error(backend):
    @backend.compile
    def step(batch):
        return batch["x"] + float(batch["x"].sum())

    with pytest.raises(RuntimeError):
        step(backend.shard_batch({"x": torch.randn(4, 2)}))
    double = backend.compile(lambda batch: batch["x"] * 2)
    host = torch.randn(4, 2)
    torch.testing.assert_close(
        backend.to_host({"y": double(backend.shard_batch({"x": host}))})["y"], host * 2
    )


@pytest.mark.slow
def test_a_scan_contains_one_block_for_each_direction(backend, monkeypatch):
    from rae_xla.runtime.xla import compat

    monkeypatch.setattr(backend, "_scan", True)
    monkeypatch.setattr(backend, "_remat", 0.0)
    products = []
    for depth in (3, 6):
        sizes = {"input_size": 4, "in_channels": 8, "hidden_size": (16, 24), "depth": (depth, 1)}
        model = backend.place(DiTDH(**sizes, num_heads=2, num_classes=4).train())
        batch = {"x": torch.randn(8, 8, 4, 4), "t": torch.rand(8), "y": torch.arange(8) % 4}
        placed = backend.shard_batch(batch)
        loss = model(**placed, label_drop=placed["y"] > 2).square().mean()
        trained = [p for p in model.parameters() if p.requires_grad]
        text = compat.graph_hlo_text(torch.autograd.grad(loss, trained))
        assert text.count(" while(") == 2
        products.append(text.count(" dot("))
    assert products[0] == products[1] > 0


@pytest.fixture
def kernels(backend):
    """Register the flash kernels' arithmetic on the CPU, from 128 tokens."""
    pytest.importorskip("jax")
    from rae_xla.runtime.xla.flash_attention import FlashAttention
    from rae_xla.runtime.xla.spmd_mesh import SpmdMesh

    flash = FlashAttention(SpmdMesh.current(), 128, interpret=True)
    with dispatch.register("attention", "xla", flash):
        yield flash


def heads(tokens, channels):
    return [torch.randn(4, 2, tokens, channels) for _ in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_equals_plain_attention(backend, kernels, causal):
    """Forward and backward, each device on its rows; 24 channels are padded to 128."""
    query, key, value, weight = heads(128, 24)

    def run(query, key, value, weight):
        given = [t.detach().clone().requires_grad_() for t in (query, key, value)]
        result = attention(*given, causal=causal)
        with torch.no_grad():
            without_gradient = attention(*given, causal=causal)
        return [result, without_gradient, *torch.autograd.grad(result, given, weight)]

    placed = backend.shard_batch({"query": query, "key": key, "value": value, "weight": weight})
    found = backend.compile(lambda batch: run(**batch))(placed)
    assert sharding(found[0]) == sharding(placed["query"])
    expected = run(query, key, value, weight)
    host = backend.to_host({str(i): tensor for i, tensor in enumerate(found)})
    torch.testing.assert_close(list(host.values()), expected, rtol=1e-5, atol=2e-6)


def test_unsupported_shapes_are_left_to_plain_attention(backend, kernels):
    for tokens in (64, 200):
        query, key, value, _ = heads(tokens, 8)
        assert kernels(query, key, value) is None
    query, key, value, _ = heads(128, 8)
    assert kernels(query, key[:, :, :64], value[:, :, :64]) is None
    assert kernels(query[:3], key[:3], value[:3]) is None  # three rows for four devices
    assert kernels(query, key, value, torch.zeros(1, 1, 1, 128)) is None  # a bias


@pytest.fixture
def whole_kernels(backend):
    """Register the arithmetic of the whole-sequence kernels on the CPU."""
    pytest.importorskip("jax")
    from rae_xla.runtime.xla.spmd_mesh import SpmdMesh
    from rae_xla.runtime.xla.whole_attention import WholeAttention

    whole = WholeAttention(SpmdMesh.current(), interpret=True)
    with (
        dispatch.register("attention", "xla", whole),
        dispatch.register("rotary_attention", "xla", whole.rotary),
    ):
        yield whole


@pytest.mark.slow
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize(
    ("tokens", "channels", "dtype", "tolerance"),
    [
        (128, 24, torch.float32, 2e-6),
        # 2**-8 is the rounding of bf16; five are rounded in a row
        pytest.param(256, 72, torch.bfloat16, 5 * 2.0**-8, marks=pytest.mark.nightly),
    ],
    ids=["fp32", "bf16"],
)
def test_whole_attention_equals_plain_attention(
    backend, whole_kernels, tokens, channels, dtype, tolerance, rotated
):
    """Forward and backward, each device on its rows; plain attention in fp32 is the reference."""
    given = [tensor.to(dtype) for tensor in heads(tokens, channels)]
    # As in tests/ops/test_rotary.py, arbitrary tables; these preserve the variance.
    tables = torch.randn(3, tokens, channels).div(3**0.5).unbind() if rotated else ()

    def run(attend, weight, query, key, value, *tables):
        given = [t.detach().clone().requires_grad_() for t in (query, key, value)]
        result = attend(*given, *tables)
        return [result, *torch.autograd.grad(result, given, weight)]

    def reference(query, key, value, *tables):
        return (
            rotary_attention(query, key, value, tables) if tables else attention(query, key, value)
        )

    tensors = [given[3], *given[:3], *tables]
    placed = backend.shard_batch({str(i): tensor for i, tensor in enumerate(tensors)})
    kernels = whole_kernels.rotary if rotated else whole_kernels
    found = backend.compile(lambda batch: run(kernels, *batch.values()))(placed)
    assert sharding(found[0]) == sharding(placed["0"])
    host = backend.to_host({str(i): tensor.float() for i, tensor in enumerate(found)})
    expected = run(reference, *(tensor.float() for tensor in tensors))
    for tensor, value in zip(host.values(), expected, strict=True):
        assert (tensor - value).abs().max() <= tolerance * value.abs().max()


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotary"])
def test_whole_attention_is_traced_on_fake_tensors(backend, whole_kernels, rotated):
    """A scan over blocks traces them so, forward and backward."""
    with FakeTensorMode():
        given = [torch.randn(4, 2, 128, 24, requires_grad=True) for _ in range(3)]
        tables = [torch.randn(128, 24) for _ in range(3)]
        result = whole_kernels.rotary(*given, *tables) if rotated else whole_kernels(*given)
        gradients = torch.autograd.grad(result.sum(), given)
    assert {tuple(tensor.shape) for tensor in (result, *gradients)} == {(4, 2, 128, 24)}


def test_whole_attention_leaves_unsupported_arguments_to_others(backend, whole_kernels):
    for tokens, channels in ((64, 8), (200, 8), (1024, 8), (128, 12)):
        query, key, value, _ = heads(tokens, channels)
        assert whole_kernels(query, key, value) is None
    query, key, value, _ = heads(128, 8)
    assert whole_kernels(query, key[:, :, :64], value[:, :, :64]) is None
    assert whole_kernels(query[:3], key[:3], value[:3]) is None  # three rows for four devices
    assert whole_kernels(query, key, value, torch.zeros(1, 1, 1, 128)) is None  # a bias
    assert whole_kernels(query, key, value, None, True) is None  # causal


def test_flash_attention_is_for_long_sequences_on_tpus():
    from rae_xla.runtime.xla.flash_attention import (
        AUTO_TOKENS,
        JAX_VERSION,
        installed_version,
        minimum_tokens,
    )

    assert minimum_tokens("auto", "bf16", tpu=False) is None
    assert minimum_tokens("plain", "bf16", tpu=True) is None
    assert minimum_tokens("auto", "fp32", tpu=True) is None
    with pytest.raises(UserError, match="only on TPUs"):
        minimum_tokens("flash", "bf16", tpu=False)
    if installed_version("jax") == JAX_VERSION:
        assert minimum_tokens("auto", "bf16", tpu=True) == AUTO_TOKENS
        assert minimum_tokens("flash", "bf16", tpu=True) == 0
        with pytest.raises(UserError, match="precision"):
            minimum_tokens("flash", "fp32", tpu=True)
    else:
        assert minimum_tokens("auto", "bf16", tpu=True) is None
