"""Scaling laws: their forms, fits to measured losses, uncertainty, and published coefficients."""
