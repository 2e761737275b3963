"""Analysis of HLO modules. ``step.hlo`` is assembled from shortened lines of compiled modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from rae_xla.tools.plan.collectives import bytes_sent_by_kind, find_collectives, find_faults
from rae_xla.tools.plan.hlo import Module, Shape, parse_module, parse_shapes
from rae_xla.tools.plan.hlo_flops import hlo_flops
from rae_xla.tools.plan.liveness import peak_memory
from rae_xla.tools.plan.traffic import memory_traffic

WIDTH, TOKENS, ROWS, CHIPS = 768, 261, 16, 16
WEIGHT = 2 * WIDTH * WIDTH
SHARD = WEIGHT // CHIPS
ACTIVATION = 2 * ROWS * TOKENS * WIDTH
BODY = "wide.windowed_dot_general_body_ag.1.sunk"


@pytest.fixture
def module() -> Module:
    return parse_module((Path(__file__).parent / "step.hlo").read_text())


def test_parse_shapes():
    text = "(bf16[16,261,768]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)S(6)}, pred[3]{0:T(512)S(1)})"
    assert list(parse_shapes(text)) == [
        Shape("bf16", (16, 261, 768)),
        Shape("s32", (), 6),
        Shape("pred", (3,), 1),
    ]
    assert Shape("s4", (3,)).num_bytes == 2


def test_parse_an_instruction(module):
    gather = module.computations[module.entry]["all-gather.150"]
    assert gather.opcode == "all-gather"
    assert gather.operands == ("convert.2",)
    assert gather.shapes == (Shape("bf16", (WIDTH, WIDTH)),)
    assert gather.attribute(r"channel_id=(\d+)") == "447"


def test_a_loop_body_counts_once_per_iteration(module):
    assert module.execution_counts[BODY] == 4  # for (i = 0; i < 8; i += 2)
    assert module.execution_counts["fused_computation.22"] == 4
    assert module.execution_counts[module.entry] == 1
    assert module.unknown_loops == []


def test_a_loop_of_unknown_length_is_reported():
    text = (Path(__file__).parent / "step.hlo").read_text()
    module = parse_module(text.replace("direction=LT", "direction=NE"))
    assert module.execution_counts[BODY] == 1
    assert module.unknown_loops == ["while.119"]


def test_text_without_an_entry_is_rejected():
    with pytest.raises(ValueError, match="ENTRY"):
        parse_module("HloModule nothing\n")


def test_bytes_sent_by_kind(module):
    sent = bytes_sent_by_kind(find_collectives(module, CHIPS))
    fraction = 15 / 16
    gradient = 2 * 6912 * 1152 + 4
    assert sent == pytest.approx(
        {
            "all-gather": WEIGHT * fraction,
            "between-slices": SHARD,
            "collective-permute": 4 * SHARD,  # one shard per iteration
            "reduce-scatter": WEIGHT * fraction,  # an all-reduce that keeps one shard
            "all-reduce": 2 * gradient * fraction
            + 2 * ACTIVATION * 3 / 4,  # the second in groups of 4
        }
    )


def test_pieces_of_a_collective_count_once(module):
    entry = module.computations[module.entry]
    before = bytes_sent_by_kind(find_collectives(module, CHIPS))
    module.computations[BODY]["piece"] = entry["all-gather.150"]
    assert bytes_sent_by_kind(find_collectives(module, CHIPS)) == before


def test_faults_of_an_fsdp_step(module):
    collectives = find_collectives(module, CHIPS)
    [fault] = find_faults(collectives, [(WIDTH, WIDTH), (6912, 1152)])
    assert fault == "all-reduce of activations: 6.1 MiB, bf16[16, 261, 768] aten__native_batch_norm"
    assert (
        len(find_faults(collectives, [])) == 2
    )  # without shapes of weights, a gradient looks like an activation


@pytest.mark.parametrize(
    ("shape", "is_fault"),
    [("2048,5461", False), ("512,5504", False), ("512,5461", False), ("500,5461", True)],
    ids=["the gradient", "padded rows of it", "rows of it", "other rows"],
)
def test_rows_of_a_gradient_are_no_activations(shape, is_fault):
    text = (Path(__file__).parent / "step.hlo").read_text()
    module = parse_module(
        text.replace(
            "bf16[16,261,768]{1,2,0:T(8,128)(2,1)} all-reduce", f"bf16[{shape}] all-reduce"
        )
    )
    found = find_faults(
        find_collectives(module, CHIPS), [(WIDTH, WIDTH), (6912, 1152), (5461, 2048)]
    )
    assert bool(found) == is_fault


def test_reduce_scatters_that_share_a_channel_count_separately(module):
    """torch_xla gives the collectives of all manual partitions the same channel."""
    line = (
        "  %{name} = bf16[192,768]{{1,0}} reduce-scatter(%x), channel_id=1, "
        "replica_groups={{{{0,4,8,12}},{{1,5,9,13}},{{2,6,10,14}},{{3,7,11,15}}}}, "
        'dimensions={{0}}, metadata={{op_name="{name}"}}'
    )
    names = ("reduce-scatter.1", "reduce-scatter.2")
    lines = [line.format(name=name) for name in names]
    text = "HloModule step\n\nENTRY %main () -> bf16[] {\n" + "\n".join(lines) + "\n}\n"
    found = find_collectives(parse_module(text), CHIPS)
    assert [collective.bytes_sent for collective in found] == 2 * [2 * 192 * 768 * 3]


def test_a_weight_gathered_in_float32_is_a_fault():
    text = (Path(__file__).parent / "step.hlo").read_text()
    module = parse_module(text.replace("%all-gather.150 = bf16", "%all-gather.150 = f32"))
    found = find_faults(find_collectives(module, CHIPS), [(WIDTH, WIDTH), (6912, 1152)])
    assert "all-gather in float32: 2.2 MiB, f32[768, 768] aten__addmm.3" in found


def test_memory_traffic(module):
    by_name = {row.operation: row for row in memory_traffic(module)}
    assert by_name["all-gather"].num_bytes == SHARD + WEIGHT
    [product] = [row for row in memory_traffic(module) if row.shapes == "bf16[16, 261, 2, 48]"]
    assert (product.operation, product.source, product.count) == ("fusion", "aten__mm", 4)
    assert product.num_bytes == 4 * (ACTIVATION + 2 * SHARD + 2 * ROWS * TOKENS * 2 * 48)


def test_an_in_place_update_accesses_only_the_updated_part(module):
    [update] = [
        row
        for row in memory_traffic(module)
        if row.operation == "fusion" and row.shapes == f"bf16[{ROWS}, {TOKENS}, {WIDTH}]"
    ]
    assert update.num_bytes == 4 * (2 * ROWS * TOKENS * 48)  # the source is in on-chip memory


NESTED = """HloModule loop

%cut (p: bf16[28,16,8], i: s32[]) -> bf16[16,8] {
  %p = bf16[28,16,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,16,8]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,16,8}
  ROOT %row = bf16[16,8]{1,0} bitcast(%one)
}

%product (a: bf16[28,16,8], i: s32[], b: bf16[16,4]) -> bf16[8,4] {
  %a = bf16[28,16,8]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %b = bf16[16,4]{1,0} parameter(2)
  %rows = bf16[16,8]{1,0} fusion(%a, %i.1), kind=kLoop, calls=%cut
  ROOT %dot = bf16[8,4]{1,0} dot(%rows, %b), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}

ENTRY %main (a.1: bf16[28,16,8], i.2: s32[], b.1: bf16[16,4]) -> bf16[8,4] {
  %a.1 = bf16[28,16,8]{2,1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  %b.1 = bf16[16,4]{1,0} parameter(2)
  ROOT %f = bf16[8,4]{1,0} fusion(%a.1, %i.2, %b.1), kind=kOutput, calls=%product
}
"""


def test_a_slice_in_a_nested_fusion_reads_only_its_part():
    [row] = memory_traffic(parse_module(NESTED))
    assert row.num_bytes == 2 * (16 * 8 + 16 * 4 + 8 * 4) + 4
    without_slice = NESTED.replace("fusion(%a, %i.1), kind=kLoop, calls=%cut", "reduce(%a, %i.1)")
    [row] = memory_traffic(parse_module(without_slice))
    assert row.num_bytes == 2 * (28 * 16 * 8 + 16 * 4 + 8 * 4) + 4


def test_peak_memory(module):
    peak = peak_memory(module, [(WIDTH, WIDTH), (6912, 1152)], CHIPS, ROWS)
    gradient = 2 * 6912 * 1152
    assert peak.by_kind == {
        "weights": gradient
        + WEIGHT
        + SHARD,  # gathered for the last instruction; the loop carries a shard
        "activations": ACTIVATION,  # one buffer: the loop updates it in place
        "other": 4,  # the scalar that is reduced with the gradient
    }
    assert peak.num_bytes == sum(peak.by_kind.values())
    assert peak.largest[0][:2] == ("bf16[6912, 1152]", gradient)


def test_flops_of_a_traced_step():
    text = (Path(__file__).parent / "traced.hlo").read_text()
    assert hlo_flops(parse_module(text)) == 2 * 4 * 8 * 32 * 16 + 2 * (2 * 5 * 4 * 4) * (3 * 2 * 2)


def test_flops_of_manually_sharded_products_count_on_every_chip():
    """Two products: one of the rows of each chip, one of the unsharded result."""
    by = "custom-call(%s), custom_call_target="
    text = "\n".join([
        "ENTRY %main (x: f32[8,2]) -> f32[2,2] {",
        "  %x = f32[8,2]{1,0} parameter(0)",
        f'  %own = f32[2,2]{{1,0}} {by % "%x"}"SPMDFullToShardShape", sharding={{manual}}',
        "  %copy.1 = f32[2,2]{1,0} copy(%own)",
        "  %dot.1 = f32[2,2]{1,0} dot(f32[2,2]{1,0} %copy.1, f32[2,2]{1,0} %own), "
        "lhs_contracting_dims={0}, rhs_contracting_dims={0}",
        f'  %all = f32[2,2]{{1,0}} {by % "%dot.1"}"SPMDShardToFullShape", sharding={{replicated}}',
        "  ROOT %dot.2 = f32[2,2]{1,0} dot(f32[2,2]{1,0} %all, f32[2,2]{1,0} %all), "
        "lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "}",
    ])  # fmt: skip
    one = 2 * 2 * 2 * 2
    assert hlo_flops(parse_module(text), chips=4) == 4 * one + one


def test_flops_of_attention_kernels_count_on_every_chip():
    """Two products of (N, d) and (d, N) matrices forward, five backward, on each chip."""
    result = "(f32[2,128,128]{2,1,0}, bf16[2,3,128,64]{3,2,1,0}, f32[2,3,128,128]{3,2,1,0})"
    transposed = "bf16[2,3,64,128]{3,2,1,0}"
    kernel = 'custom-call(%q), custom_call_target="tpu_custom_call", metadata={op_name="%s/call"}'
    text = "\n".join([
        "ENTRY %main (q: bf16[2,3,128,64]) -> bf16[2,3,128,64] {",
        "  %q = bf16[2,3,128,64]{3,2,1,0} parameter(0)",
        f"  %a = {result} {kernel.replace('%s', 'splash_mha_fwd_residuals')}",
        f"  %b = {result} {kernel.replace('%s', 'jit/vmap(splash_mha_dkv)')}",
        f"  %c = {transposed} {kernel.replace('%s', 'whole_attention_fwd')}",
        f"  ROOT %d = {transposed} {kernel.replace('%s', 'whole_attention_bwd')}",
        "}",
    ])  # fmt: skip
    assert hlo_flops(parse_module(text), chips=4) == 4 * 2 * (2 + 5) * 2 * (2 * 3 * 128 * 128 * 64)
