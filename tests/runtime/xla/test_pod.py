"""What the environment says about the slices and hosts of a pod, and meshes that do not fit it."""

import pytest

from rae_xla.errors import UserError
from rae_xla.runtime.mesh import MeshShape, check_tensor_axis
from rae_xla.runtime.xla.pod import Megascale, check_slices, check_tensor_groups

METADATA = {
    "ACCELERATOR_TYPE": "v6e-1",
    "WORKER_ID": 0,
    "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.7",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": 1,
}


def test_megascale_variables_come_from_the_environment_or_the_metadata():
    found = Megascale(lambda: METADATA, {})
    assert (found.coordinator, found.num_slices, found.slice_id) == ("10.0.0.7", 2, 1)
    environment = {"MEGASCALE_COORDINATOR_ADDRESS": "host-0:8080", "MEGASCALE_NUM_SLICES": "4"}
    found = Megascale(lambda: METADATA, environment)
    assert (found.coordinator, found.num_slices, found.slice_id) == ("host-0", 4, 1)
    alone = Megascale(dict, {})
    assert (alone.coordinator, alone.num_slices, alone.slice_id) == (None, None, 0)
    with pytest.raises(UserError, match="MEGASCALE_NUM_SLICES is 'two'"):
        _ = Megascale(dict, {"MEGASCALE_NUM_SLICES": "two"}).num_slices


@pytest.mark.parametrize(("slices", "found", "expected"), [(1, 1, None), (2, 2, 2), (2, 2, None)])
def test_slices_that_joined(slices, found, expected):
    check_slices(MeshShape(data=1, fsdp=4, slices=slices), found, expected)


def test_slices_that_did_not_join_are_refused():
    """Each of them sees only its own devices."""
    with pytest.raises(
        UserError, match=r"NUM_SLICES is 2, but .* 1 slice: the slices did not join"
    ):
        check_slices(MeshShape(data=1, fsdp=4, slices=1), 1, 2)
    with pytest.raises(UserError, match="did not join"):
        check_slices(MeshShape(data=1, fsdp=2, slices=2), 1, 2)


def test_sharding_across_slices_is_refused():
    with pytest.raises(UserError, match=r"2: set mesh\.dcn\.data=2.*weights over the network"):
        check_slices(MeshShape(data=1, fsdp=8, slices=1), 2, 2)
    with pytest.raises(UserError, match=r"describes 4 slices.* 2: set mesh\.dcn\.data=2"):
        check_slices(MeshShape(data=1, fsdp=2, slices=4), 2, None)


def test_sharding_across_slices_can_be_asked_for():
    check_slices(MeshShape(data=1, fsdp=4, slices=2, fsdp_slices=2), 2, 2)


def test_replicas_on_several_slices_need_no_setting():
    """As in sampling, whose mesh has one axis over all devices."""
    check_slices(MeshShape(data=8, fsdp=1), 2, 2)


def test_a_tensor_group_must_be_on_one_host():
    check_tensor_groups([[0, 0], [0, 0], [1, 1], [1, 1]], 2)
    with pytest.raises(UserError, match=r"mesh\.ici\.tensor=4 .*several hosts"):
        check_tensor_groups([[0, 0, 1, 1], [0, 0, 1, 1]], 2)
    with pytest.raises(UserError, match=r"different numbers of shards .*\[3, 1\]"):
        check_tensor_groups([[0], [0], [0], [1]], 2)


def test_a_tensor_axis_must_divide_the_devices_of_a_host():
    check_tensor_axis(MeshShape(data=1, fsdp=4, tensor=4), 4)
    check_tensor_axis(MeshShape(data=1, fsdp=1, tensor=8), 8)  # a single host
    for tensor in (8, 3):
        with pytest.raises(UserError, match=rf"mesh\.ici\.tensor={tensor} does not divide the 4"):
            check_tensor_axis(MeshShape(data=1, fsdp=4, tensor=tensor), 4)
