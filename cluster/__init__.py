"""SLURM templates and launch helpers. May import `pretrain.config.run` at most."""
