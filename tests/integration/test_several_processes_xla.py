"""A run moves from several processes of the torch backend to XLA, and back."""

import pytest
from tiny import make_configs, make_shards, metrics, rae_xla_processes

pytestmark = [pytest.mark.xla, pytest.mark.slow, pytest.mark.nightly]

SEGMENTS = [
    (2, 10, []),
    (1, 14, ["runtime.backend=xla", "runtime.devices=4"]),
    (2, 20, ["mesh.ici.data=2"]),
]


def test_a_run_moves_between_processes_and_xla(tmp_path):
    config = make_configs(tmp_path, make_shards(tmp_path))["stage2"]

    def train(folder, count, *overrides):
        done = rae_xla_processes(
            count, "train", "stage2", "--config", config, "--results-dir", folder, *overrides
        )
        assert [process.returncode for process in done] == [0] * count, done[0].stderr
        return metrics(folder)

    alone = train(tmp_path / "alone", 1)
    for count, steps, overrides in SEGMENTS:
        moved = train(tmp_path / "moved", count, f"training.steps={steps}", *overrides)
    for one, other in zip(moved, alone, strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), one["step"]
