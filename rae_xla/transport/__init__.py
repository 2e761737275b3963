"""Flow matching: probability paths, time distributions, losses, ODE and SDE solvers, guidance."""

from rae_xla.transport.create import create_transport
from rae_xla.transport.guidance import guided
from rae_xla.transport.transport import Transport

__all__ = ["Transport", "create_transport", "guided"]
