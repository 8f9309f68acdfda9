"""Figures of runs and studies: each as PNG and SVG, with the numbers that it shows."""
