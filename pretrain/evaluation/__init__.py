"""Comparable likelihoods: bounds with standard errors, nats per token, bits per byte."""

from parallel.imports import import_megatron

import_megatron()  # before a module imports it whole, which takes twice the time
