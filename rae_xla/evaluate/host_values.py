"""Exchange of float64 values that the processes computed on their hosts."""

from __future__ import annotations

import base64

import numpy as np
import torch
from torch import Tensor

from rae_xla.runtime import Backend


def all_gather_values(backend: Backend, values: Tensor) -> Tensor:
    """Return the values of all processes, bit by bit, in the order of the processes.

    They are sent as text, because devices may round float64, and the rows of a global tensor are
    not in the order of the processes.

    Args:
        backend: of the run; all of its processes must call this.
        values: (N,) float64, of the same length in every process.

    Returns:
        (processes, N) float64.
    """
    texts = backend.all_gather_text(base64.b64encode(values.numpy().tobytes()).decode())
    return torch.stack(
        [torch.from_numpy(np.frombuffer(base64.b64decode(text)).copy()) for text in texts]
    )
