"""Hosts of a pod find process 0 through their metadata, and exchange what devices they have."""

import json

import pytest
from fake_pod import metadata_server, run_pod
from pod_topologies import OWNERS

pytestmark = [pytest.mark.xla, pytest.mark.slow]


def tpu_env(slice_id, slices=2, coordinator="127.0.0.1:8080"):
    """The lines that Cloud TPU writes for a host of a queued resource with several nodes."""
    megascale = {
        "MEGASCALE_COORDINATOR_ADDRESS": coordinator,
        "MEGASCALE_NUM_SLICES": slices,
        "MEGASCALE_SLICE_ID": slice_id,
    }
    lines = {"ACCELERATOR_TYPE": "v6e-1", "WORKER_ID": 0} | megascale
    return "".join(f"{name}: '{value}'\n" for name, value in lines.items())


def test_slices_of_one_host_each_find_each_other():
    """Each has a single worker, so torch_xla's own discovery answers localhost on both."""
    with metadata_server([tpu_env(0), tpu_env(1, coordinator="127.0.0.1")]) as servers:
        found = run_pod(
            [
                {"index": i, "count": 2, "metadata": servers[i], "slices": 2, "texts": [f"a{i}"]}
                for i in (1, 0)  # processes are not numbered in the order of the hosts
            ]
        )
    assert found == [(0, [["a0", "a1"]])] * 2


def test_slices_that_did_not_join_refuse_to_start():
    """Each of them has the devices of one slice, and would be a run of its own."""
    with metadata_server([tpu_env(0), tpu_env(1)]) as servers:
        found = run_pod(
            [
                {"index": 0, "count": 1, "metadata": server, "slices": 1, "texts": ["a"]}
                for server in servers
            ]
        )
    for code, (kind, status, message) in found:
        assert (code, kind, status) == (0, "UserError", 2)
        assert "MEGASCALE_NUM_SLICES is 2" in message
        assert "write the same checkpoints" in message


@pytest.mark.nightly
@pytest.mark.parametrize("count", [16, 64])
def test_many_hosts_exchange_their_devices(count):
    """Four devices each, in the order of a v5e 4x4, repeated."""
    owners = OWNERS["v5e:4x4"]
    devices = [
        [16 * (i // 4) + d for d, owner in enumerate(owners) if owner == i % 4]
        for i in range(count)
    ]
    with metadata_server([tpu_env(i // 4, count // 4) for i in range(count)]) as servers:
        found = run_pod(
            [
                {
                    "index": i, "count": count, "metadata": servers[i], "slices": count // 4,
                    "devices": devices[i], "texts": [str(i)], "timeout": 120,
                }
                for i in reversed(range(count))
            ],
            timeout=300,
        )  # fmt: skip
    of_all = [json.dumps(own) for own in devices]
    assert found == [(0, [of_all, [str(i) for i in range(count)]])] * count
    assert sorted(device for own in devices for device in own) == list(range(4 * count))
