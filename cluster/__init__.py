"""SLURM templates and launch helpers. May import `pretrain.config` at most."""
