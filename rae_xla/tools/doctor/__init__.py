"""Checks of everything that a run needs on this machine."""
