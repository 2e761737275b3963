"""The host time of a step: measured by replaying a program with as many inputs and outputs."""

from __future__ import annotations

import pytest

from rae_xla.tools.plan.host import HostJob, replay_seconds

pytestmark = pytest.mark.xla


def test_a_replay_with_many_tensors_takes_longer():
    few, many = (
        replay_seconds(HostJob(inputs=2 * count, updated=count, devices=4, out=""))
        for count in (4, 200)
    )
    assert 0 < few < many < 1
