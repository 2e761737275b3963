"""Tools around a run: plan, doctor, report."""
