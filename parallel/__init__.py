"""Layouts of one run: topology, tensor-parallel parts, the DeepSpeed engine, checkpoints.

Imports nothing of ours. No file here knows which objective runs.
"""
