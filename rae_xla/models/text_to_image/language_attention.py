"""Attention of the language models of transformers: by our kernels where it is only causal.

Importing this module registers it with transformers. That takes seconds, because it also imports
torch's compiler, scipy and torchvision.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rae_xla.ops.attention import attention

ATTENTION = "rae_xla"
"""Name under which transformers knows our attention."""


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    only_causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of a layer of transformers, by ``ops.attention`` if it is only causal.

    The kernels for causal attention take no mask, so they need to know that it says nothing else.
    """
    if not only_causal or dropout:
        return sdpa_attention_forward(
            module, query, key, value, mask, scaling=scaling, dropout=dropout, **options
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    factor = 1.0 if scaling is None else scaling * query.shape[-1] ** 0.5
    query = query if math.isclose(factor, 1.0) else query * factor
    found = attention(query.to(value.dtype), key.to(value.dtype), value, causal=True)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
