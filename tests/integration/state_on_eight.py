"""Places a run's state on eight virtual devices and says in JSON what lies where.

A process of its own: the number of devices is fixed when torch_xla starts.
"""

import json
from collections import Counter

import torch_xla

from rae_xla import load_config
from rae_xla.config import RuntimeConfig
from rae_xla.models.dit_dh import DiTDH
from rae_xla.runtime import start
from rae_xla.train.state import make_state


def main() -> None:
    """Print the number of parameters, the bytes of the whole state, and those on each device."""
    runtime = start(RuntimeConfig(backend="xla", devices=8), load_config(None).mesh)
    state = make_state(DiTDH(hidden_size=(384, 512), depth=(6, 2), num_heads=(6, 8)), runtime)
    tensors = [*state.model.optimizer_tensors().values()]
    for module in (state.model.module, state.ema):
        tensors += [*module.parameters(), *module.buffers()]
    tensors = [tensor.detach() for tensor in tensors]
    on_device: Counter[str] = Counter()
    for shards in torch_xla._XLAC._get_local_shards(tensors):
        for shard, device in shards:
            on_device[device] += shard.nbytes
    trained = sum(p.numel() for p in state.model.parameters().values())
    total = sum(tensor.nbytes for tensor in tensors)
    print(json.dumps({"trained": trained, "total": total, "on_device": on_device}))


if __name__ == "__main__":
    main()
