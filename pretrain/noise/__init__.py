"""Noise: counter-based keys, schedules, stratified times."""
