"""Flow matching: paths, times, losses, solvers, guidance."""
