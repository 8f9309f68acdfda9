"""Epochal: pretraining of AR and diffusion language models on a fixed set of repeated tokens.

Rooms: `config` (one typed tree), `objectives` and `noise` (the science), `model`, `train` (the
loop), `evaluation`, `sampling`, `tracking`, `cli`. Importing this package must stay free of torch:
the command line answers `--help` from it.
"""

__version__ = "0.1.0"
