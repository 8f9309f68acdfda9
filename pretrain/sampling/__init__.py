"""Samplers: one file for each family; results have their settings, seed and network evaluations."""

from parallel.imports import import_megatron

import_megatron()  # before a module imports it whole, which takes twice the time
