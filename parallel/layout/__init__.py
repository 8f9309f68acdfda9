"""Degrees of parallelism, their rules, ranks and stages."""
