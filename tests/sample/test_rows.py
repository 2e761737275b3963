"""Results of devices: copied when they are computed, and used while the devices go on."""

from __future__ import annotations

import torch
from evaluation_host import Host

from rae_xla.evaluate.set_features import measure_features
from rae_xla.sample.rows import in_flight


def test_results_are_in_order_and_started_ahead():
    events = []

    def start(i):
        events.append(f"start {i}")
        return lambda: events.append(f"wait {i}") or i

    assert list(in_flight((start(i) for i in range(4)), depth=2)) == [0, 1, 2, 3]
    assert events == [
        *("start 0", "start 1", "start 2", "wait 0", "start 3", "wait 1", "wait 2", "wait 3")
    ]
    assert list(in_flight(iter([]))) == []


class OneGpu(Host):
    """Records the order of submitted work and of waiting for it."""

    def __init__(self):
        super().__init__()
        self.events = []

    def to_host_later(self, tensors):
        number = self.events.count("copy")
        self.events.append("copy")
        return lambda: self.events.append(f"wait {number}") or self.to_host(tensors)


class Network:
    def __init__(self, backend):
        self.backend = backend

    def all(self, rows):
        self.backend.events.append("compute")
        return {"pool": rows.float().flatten(1)[:, :4]}


class Images:
    name, count = "noise", 20

    def chunks(self, rows, own):
        pixels = torch.randint(0, 256, (self.count, 3, 2, 2), dtype=torch.uint8).numpy()
        for start in range(0, self.count, rows):
            yield pixels[start : start + rows]


def test_features_are_copied_before_the_next_chunk_is_submitted():
    """A copy that is submitted later would wait for that chunk."""
    backend = OneGpu()
    found = measure_features(Images(), backend, [Network(backend)], ["fid"], batch_size=8)
    assert "pool" in found.gaussians
    assert backend.events == [
        *("compute", "copy", "compute", "copy", "wait 0", "compute", "copy", "wait 1", "wait 2")
    ]
