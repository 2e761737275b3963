"""FSDP2: which weights are gathered in bf16, and which blocks are compiled."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_steps import build_discriminator, build_model
from fsdp_steps import BLOCKS
from torch import nn

from rae_xla.models.layers import FusedLinear
from rae_xla.runtime.torch.fsdp import is_cast_by_autocast


def run(folder, what):
    script = Path(__file__).parents[2] / "helpers" / "fsdp_steps.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), what],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def cast_parameters(module):
    return {
        f"{path}.{name}"
        for path, layer in module.named_modules()
        for name, _ in layer.named_parameters(recurse=False)
        if is_cast_by_autocast(layer, name)
    }


def test_autocast_casts_the_matrices_of_every_block():
    model = build_model()
    assert any(isinstance(layer, FusedLinear) for layer in model.modules())
    cast = cast_parameters(model)
    for name, parameter in model.blocks.named_parameters(prefix="blocks"):
        assert (name in cast) == ("norm" not in name), (name, parameter.shape)


def test_autocast_casts_no_weight_that_is_normalised_first():
    names = [name for name, _ in build_discriminator().named_parameters()]
    cast = cast_parameters(build_discriminator())
    assert any(name.endswith("weight_orig") for name in names)
    assert not any(name.endswith("weight_orig") for name in cast)


def test_what_autocast_casts_is_what_the_policy_says():
    """Measured: the dtype of the weights that layers use under autocast."""
    layers = {
        "linear": (nn.Linear(4, 6), torch.randn(2, 4)),
        "fused": (FusedLinear(4, 3, 2), torch.randn(2, 4)),
        "conv": (nn.Conv1d(4, 6, 1), torch.randn(2, 4, 3)),
        "norm": (nn.LayerNorm(4), torch.randn(2, 4)),
    }
    for name, (layer, x) in layers.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(x)
        output = output[0] if isinstance(output, tuple) else output
        assert (output.dtype == torch.bfloat16) == is_cast_by_autocast(layer, "weight"), name


@pytest.mark.slow
def test_a_step_in_bf16_gathers_half_the_bytes(tmp_path):
    for counted in run(tmp_path, "gathers"):
        [(dtype, in_bf16)] = counted["bf16"].items()
        assert dtype == torch.bfloat16
        assert counted["fp32"] == {torch.float32: 2 * in_bf16}
        assert set(counted["discriminator"]) == {torch.float32}  # spectral norm needs all digits


@pytest.mark.slow
def test_all_rematerialised_blocks_are_compiled(tmp_path):
    for counted in run(tmp_path, "compiles"):
        compiled, eager = counted["compiled"], counted["eager"]
        assert eager["runs"] == 0
        assert compiled["runs"] == sum(BLOCKS)
        assert compiled["graphs"] == len(BLOCKS)
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-5)
        for ours, theirs in zip(compiled["gradients"], eager["gradients"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
