"""Objectives: clean tokens to a training batch, head outputs to a loss. One file a family."""
