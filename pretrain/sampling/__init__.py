"""Samplers: one file a family; every result carries its settings, seed and network evaluations."""
