"""First run on new hardware: checks and times everything in ten minutes, into one file."""
