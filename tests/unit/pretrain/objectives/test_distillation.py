"""Consistency distillation: the pair is the Gaussian path's, the loss is the KL, the target is known.
"""
