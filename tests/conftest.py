"""Shared by every test: one thread, so that numbers and timings do not depend on the machine; and a
storage server. Every test begins with the same random numbers, and so does a failure.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gcs_emulator import GcsEmulator

torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    """Before any fixture: torch would begin with others in each process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def gcs() -> Iterator[GcsEmulator]:
    """A storage server of this worker's own, which ``gs://`` means while it runs."""
    with GcsEmulator() as emulator, pytest.MonkeyPatch.context() as environment:
        emulator.create_bucket("shards")
        for name, value in emulator.environment().items():
            environment.setenv(name, value)
        yield emulator
