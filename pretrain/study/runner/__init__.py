"""Studies as grids of runs: declared in YAML, planned, executed, collected."""
