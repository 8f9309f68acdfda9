"""Epochal: pretraining of AR and diffusion language models on a fixed set of repeated tokens.

Subpackages: `config` (one typed tree of settings), `objectives` and `noise` (the families),
`model`, `training`, `evaluation`, `sampling`, `tracking`, `planning`, `study` and `cli`; the loop
is in `train`. This package must not import torch, so that `epochal --help` answers at once.
"""

__version__ = "0.1.0"
