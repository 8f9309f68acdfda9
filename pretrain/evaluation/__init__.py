"""Comparable likelihoods: bounds with standard errors, nats per token, bits per byte."""
