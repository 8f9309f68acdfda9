"""Preemption and other ways a run ends early without losing anything."""
