"""Host memory of a run, estimated without torch, so that several runs fit on one machine."""

from __future__ import annotations

import os

from pretrain.study.runner.planned import Planned

_PROCESS_BYTES = 700 << 20
"""Memory of a rank before the model: torch, its libraries and the tokenizer."""
_STATE_BYTES = 16
"""Weight, gradient and two moments in 32 bits."""
_LAYER_TENSORS = 24
"""Tensors of the width of the model that a layer keeps for each token, the MLP's included."""


def host_bytes(run: Planned) -> float:
    """Largest memory of all ranks of a run on this machine's CPUs."""
    config, facts = run.config, run.facts
    m, width = config.model, 4 if config.train.precision == "float32" else 2
    per_rank = -(-config.train.global_batch_size // (config.parallel.data_parallel_size or 1))
    # Families that move neighbours elsewhere have a clean copy of each token, and a mask of pairs.
    doubled = config.objective.convolution == "refused"
    length = (2 if doubled else 1) * config.data.seq_length
    rows = (config.train.micro_batch_size or per_rank) * length
    layers = m.num_layers * (_LAYER_TENSORS * m.hidden_size + (length if doubled else 0))
    embedding = facts.params - facts.params_non_embedding
    logits = 3 * embedding / m.hidden_size / (1 if m.tie_embeddings else 2)
    chunked = min(rows * logits * 4, 3 << 30)  # longer logits are computed in chunks
    activations = rows * layers * width + chunked
    copies = facts.ranks if config.parallel.zero_stage == 0 else 1
    return facts.ranks * (_PROCESS_BYTES + activations) + copies * _STATE_BYTES * facts.params


def host_memory() -> float:
    """Memory of this machine in bytes."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
