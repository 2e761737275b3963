"""Which process owns each device of a pod, in the order of the device mesh.

The devices of a host are not consecutive: libtpu numbers the chips of a slice row by row, and a
host has a block of 2 x 2 of them. ``runtime/xla/test_pod_topologies_xla.py`` compares ``OWNERS``
with libtpu's own topologies.
"""

from __future__ import annotations

OWNERS = {
    "v5e:2x4": (0, 0, 0, 0, 1, 1, 1, 1),
    "v5e:4x4": (0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3),
    "v6e:4x4": (0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3),
}
"""Process of each device by its number, for some topologies."""

HYBRID = tuple(2 + owner for owner in OWNERS["v5e:2x4"]) + OWNERS["v5e:2x4"]
"""Two slices of v5e 2x4, in a mesh that starts with the second one."""
