"""Which packages a plan is compiled with. Their private parts are used: other versions are refused.

They are torch_xla 2.9.0's own pins, so the compiler is the one that production has.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

PINNED = {"torch_xla": "2.9.0", "jax": "0.7.1", "jaxlib": "0.7.1", "libtpu": "0.0.21"}


def why_no_compiler() -> str | None:
    """Why nothing can be compiled for a TPU here; None where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"libtpu runs on Linux x86-64, this is {platform.system()} {platform.machine()}"
    if sys.version_info < (3, 11):
        return f"jax {PINNED['jax']} needs Python 3.11 or 3.12, this is {platform.python_version()}"
    for name, wanted in PINNED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            return f"{name} is not installed (pip install 'rae-xla[xla,plan]')"
        if found.split("+")[0] != wanted:
            return f"{name} is {found}, and the plan knows {wanted} alone"
    return None
