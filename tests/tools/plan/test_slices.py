"""Names of TPU topologies, ours and gcloud's."""

from __future__ import annotations

import pytest

from rae_xla.config import load_config
from rae_xla.errors import UserError
from rae_xla.tools.plan.forecast import make_case
from rae_xla.tools.plan.tpus import TPU_GENERATIONS, parse_topology


@pytest.mark.parametrize(
    ("gcloud", "ours", "chips"),
    [
        ("v6e-16", "v6e:4x4", 16),
        ("v6e-8", "v6e:2x4", 8),
        ("v6e-1", "v6e:1x1", 1),
        ("v5litepod-256", "v5e:16x16", 256),
        ("v4-8", "v4:2x2x1", 4),
        ("v4-16", "v4:2x2x2", 8),
        ("v5p-32", "v5p:2x2x4", 16),
        ("v5p-64", "v5p:2x4x4", 32),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-256", "v5p:4x4x8", 128),
    ],
)
def test_both_names_give_the_same_topology(gcloud, ours, chips):
    topology = parse_topology(gcloud)
    assert topology == parse_topology(ours)
    assert (str(topology), topology.accelerator, topology.chips) == (ours, gcloud, chips)


@pytest.mark.parametrize(
    ("topology", "chips"),
    [("v6e:1x1", 1), ("v6e:2x4", 8), ("v5e:4x4", 4), ("2*v6e:2x4", 8), ("v5p:2x2x4", 4)],
)
def test_chips_of_a_host(topology, chips):
    assert parse_topology(topology).chips_per_host == chips


def test_a_tensor_group_that_does_not_fit_a_host_is_refused():
    """As at the start of the run itself (pytorch/xla issue 8842 is about smaller groups)."""
    settings = ["mesh.ici.tensor=8", "training.global_batch_size=16"]
    config = load_config(None, overrides=settings)
    with pytest.raises(UserError, match=r"mesh\.ici\.tensor=8 does not divide the 4 devices"):
        make_case(config, parse_topology("v6e:4x4"))
    assert make_case(config, parse_topology("v6e:2x4")).mesh.tensor == 8


def test_several_slices():
    topology = parse_topology("2*v6e-16")
    assert (topology.slices, topology.chips) == (2, 32)
    assert parse_topology(str(topology)) == topology


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v6e", "expected a generation and the shape"),
        ("v7x:4x4", "unknown TPU v7x; known: v4, v5e, v5p, v6e"),
        ("v6e:4x4x4", "has 2 dimensions, as in v6e:4x4"),
        ("v5p:4x4", "has 3 dimensions, as in v5p:4x4x4"),
        ("v6e-12", "v6e-8, v6e-16"),
        ("v5p-12", "counts TensorCores"),
        ("v5p-4", "counts TensorCores"),
        ("0*v6e-16", "at least 1"),
        ("v6e:0x4", "2 dimensions"),
    ],
)
def test_an_unknown_topology_is_rejected(text, message):
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        parse_topology(text)


def test_specifications_are_the_published_ones():
    """bf16 TFLOP/s and GB of HBM; the compiler reserves a little of the latter."""
    published = {"v4": (275, 32), "v5e": (197, 16), "v5p": (459, 95), "v6e": (918, 32)}
    for name, (teraflops, gigabytes) in published.items():
        assert TPU_GENERATIONS[name].peak_flops == teraflops * 1e12
        assert 0.9 < TPU_GENERATIONS[name].hbm_bytes / 2**30 / gigabytes <= 1
