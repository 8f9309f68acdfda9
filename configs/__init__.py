"""Hydra configuration groups, as package data; see docs/configuration.md."""
