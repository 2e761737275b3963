"""FLOPs of one operation: matrix products, convolutions and attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def operation_flops(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> int:
    """Return the FLOPs of an operation, a multiply-add counts as two; 0 for elementwise ones.

    torch has no formula for its attention on the CPU. It is counted like attention on CUDA: two
    matrix products forward, and five backward, one of which computes the scores again.
    """
    packet = func.overloadpacket
    if packet is _attention:
        query, key, value = args[:3]
        return int(sdpa_flop_count(query.shape, key.shape, value.shape))
    if packet is _attention_backward:
        _, query, key, value = args[:4]
        return int(sdpa_flop_count(query.shape, key.shape, value.shape)) * 5 // 2
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
