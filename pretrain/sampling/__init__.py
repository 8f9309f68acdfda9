"""Samplers: one file for each family; results have their settings, seed and network evaluations."""
