"""Place a training state on eight virtual XLA devices and print the bytes on each as JSON.

A separate process, because the number of devices is fixed when torch_xla starts.
"""

import json
from collections import Counter

from rae_xla import load_config
from rae_xla.checkpoint.train_state import make_state
from rae_xla.config import RuntimeConfig
from rae_xla.models.dit_dh import DiTDH
from rae_xla.runtime import start


def main() -> None:
    """Print the number of trained parameters, the bytes of the state, and the bytes per device."""
    backend = start(RuntimeConfig(backend="xla", devices=8), load_config(None).mesh)
    from rae_xla.runtime.xla import compat  # torch_xla is imported by the backend

    state = make_state(DiTDH(hidden_size=(384, 512), depth=(6, 2), num_heads=(6, 8)), backend)
    tensors = [*state.model.optimizer_tensors().values()]
    for module in (state.model.module, state.ema):
        tensors += [*module.parameters(), *module.buffers()]
    tensors = [tensor.detach() for tensor in tensors]
    on_device: Counter[str] = Counter()
    for shards in compat.device_shards(tensors):
        for shard in shards:
            on_device[shard.device] += shard.data.nbytes
    trained = sum(p.numel() for p in state.model.parameters().values())
    total = sum(tensor.nbytes for tensor in tensors)
    print(json.dumps({"trained": trained, "total": total, "on_device": on_device}))


if __name__ == "__main__":
    main()
