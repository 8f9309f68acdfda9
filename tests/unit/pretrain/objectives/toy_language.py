"""A tabular language over V^L with exact conditionals, standing in for head outputs."""

import itertools
import math

import numpy as np
import torch

from pretrain.batch import CleanBatch
from pretrain.vocabulary import TokenSpace

V, L = 3, 3
FIRST = 6  # id of the first ordinary token
SPACE = TokenSpace(FIRST + V, 16, 0, 4, 5, (0, 1, 2, 3, 4, 5 - 1))
JOINT = np.random.default_rng(0).dirichlet(np.ones(V**L) * 0.5).reshape((V,) * L)
SEQUENCES = list(itertools.product(range(V), repeat=L))


def clean_batch(tokens, positions, valid=None):
    """CleanBatch of toy sequences [n][L] (0-based symbols) at global positions."""
    tokens = torch.as_tensor(tokens, dtype=torch.int64) + FIRST
    valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    return CleanBatch(
        tokens=torch.where(valid, tokens, SPACE.pad_id),
        position=torch.as_tensor(positions, dtype=torch.int64),
        segment=torch.zeros_like(tokens, dtype=torch.int32),
        valid=valid,
        all_valid=bool(valid.all()),
    )


def conditional(visible):
    """p(x^l | visible) for every l: [L][V]; visible maps position to symbol."""
    table = JOINT[tuple(visible.get(i, slice(None)) for i in range(L))]
    hidden = [i for i in range(L) if i not in visible]
    out = np.full((L, V), np.nan)
    for axis, l in enumerate(hidden):
        other = tuple(a for a in range(len(hidden)) if a != axis)
        marginal = table.sum(axis=other)
        out[l] = marginal / marginal.sum()
    return out


class TableChunk:
    """The part of `VocabChunk` that a cross-entropy needs, from explicit log probabilities."""

    def __init__(self, log_probability):
        self.log_probability = log_probability

    def cross_entropy(self, ids):
        return -self.log_probability.gather(1, ids[:, None])[:, 0]


def known_to(batch, row):
    """What the network can know at a row: symbols {position: symbol} that its query reaches through
    any number of layers under the attention rule."""
    width = batch.ids.shape[1]
    b, at = divmod(row, width)
    if batch.attention.kind == "bidirectional":
        mask = np.ones((width, width), dtype=bool)
    else:
        mask = batch.attention.mask()[b, 0].numpy()
    reached = np.zeros(width, dtype=bool)
    reached[at] = True
    while True:
        further = reached | mask[reached].any(axis=0)
        if (further == reached).all():
            break
        reached = further
    tokens, positions = batch.ids[b].numpy(), batch.positions[0].numpy()
    return {
        int(positions[i]): int(tokens[i] - FIRST)
        for i in np.flatnonzero(reached)
        if tokens[i] != SPACE.mask_id
    }


def reading_chunk(batch, table=conditional):
    """Answers of `table` (what is known -> [L][V]) at the rows of a batch, each given what it can
    know; a row that can see its own target fails here."""
    out = np.full((len(batch.rows), SPACE.vocab_size), -np.inf)
    width, made = batch.ids.shape[1], {}
    columns = batch.attention.columns
    for i, row in enumerate(batch.rows.tolist()):
        b, at = divmod(row, width)
        rule = () if columns is None else tuple(columns[:, b].flatten().tolist())
        key = (at, tuple(batch.ids[b].tolist()), rule)
        if key not in made:
            shown = known_to(batch, row)
            place = int(batch.positions[0, at])
            assert place not in shown, "the target leaks into its own input"
            made[key] = np.log(table(shown)[place])
        out[i, FIRST:] = made[key]
    return TableChunk(torch.from_numpy(out))


def masked_chunk(batch):
    """Exact conditionals of the toy language at the rows of a masked batch."""
    out = np.full((len(batch.rows), SPACE.vocab_size), -math.inf)
    table = {}
    for i, row in enumerate(batch.rows.tolist()):
        b, l = divmod(row, L)
        ids = tuple(batch.ids[b].tolist())
        if ids not in table:
            shown = {j: t - FIRST for j, t in enumerate(ids) if t != SPACE.mask_id}
            table[ids] = conditional(shown)
        out[i, FIRST:] = np.log(table[ids][l])
    return TableChunk(torch.from_numpy(out))
