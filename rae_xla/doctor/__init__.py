"""What a machine needs for a run, tried out one by one."""
