"""A text-to-image run that is killed continues with the very same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from tiny_captions import make_config, make_mixture

STEPS = 24


@pytest.mark.parametrize(
    "settings",
    [
        [],
        pytest.param(
            ["runtime.backend=xla", "runtime.devices=4"],
            marks=[pytest.mark.xla, pytest.mark.nightly],
        ),
    ],
    ids=["torch", "xla, 4 devices"],
)
def test_killed_run_resumes_bit_identical(tmp_path: Path, settings: list[str]) -> None:
    config = make_config(tmp_path, "set below")
    mixed = [*make_mixture(tmp_path), f"training.steps={STEPS}", "checkpoint.every_steps=4"]
    mixed += settings

    def start(name: str) -> tiny.StartedCommand:
        results = ("--results-dir", tmp_path / name)
        return tiny.start_rae_xla(
            "train", "t2i", "--config", config, *results, *mixed, log=tmp_path / f"{name}.log"
        )

    whole, killed = start("whole"), start("killed")
    tiny.wait_for_checkpoint(tmp_path / "killed", 4)
    killed.kill()
    assert killed.wait() == -9, (tmp_path / "killed.log").read_text()
    assert start("killed").wait() == 0, (tmp_path / "killed.log").read_text()
    assert whole.wait() == 0, (tmp_path / "whole.log").read_text()
    assert "resum" in (tmp_path / "killed.log").read_text()
    tiny.same_bits(tmp_path / "killed", tmp_path / "whole", STEPS)
    first, second = (
        {row["step"]: row["train/loss"] for row in tiny.metrics(tmp_path / name)}
        for name in ("whole", "killed")
    )
    assert first == second
