"""Likelihoods that can be compared: bounds with standard errors, nats per token, bits per byte."""
