"""What commands leave out of their start: modules that take seconds to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rae_xla.sample.tiny_model import write_tiny_model

SLOW_MODULES = ("torch._dynamo", "sympy", "scipy", "torchvision", "transformers.modeling_utils")
"""The compiler of torch, and what transformers' models import. Each takes 0.3 to 2 s."""

PROGRAM = f"""
import sys
from rae_xla.cli.main import main
status = main(sys.argv[1:])
import rae_xla.evaluate.reconstruction, rae_xla.sample.pipeline, rae_xla.train.trainer
found = [name for name in {SLOW_MODULES} if name in sys.modules]
sys.exit(f"imported: {{found}}" if found else status)
"""


@pytest.mark.slow
def test_generate_train_and_evaluate_import_no_slow_module(tmp_path):
    """Language models and ``runtime.compile`` need these modules, and import them later."""
    model, out = write_tiny_model(tmp_path), tmp_path / "images"
    command = ["generate", "--model", model, "--num-samples", "1", "--num-steps", "2", "--out", out]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command, "runtime.backend=torch"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
