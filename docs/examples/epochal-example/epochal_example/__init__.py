"""Components for Epochal from outside: one file each, with a YAML in `configs/`."""
