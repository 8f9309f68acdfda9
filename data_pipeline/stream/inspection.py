"""Views into pools and runs for people: text of a sequence, its documents, steps that see it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import DataError, TokenizerError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.documents import SeparatorIndex, segments
from data_pipeline.stream.stream import Stream
from data_pipeline.tokenizer import Tokenizer


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Raise TokenizerError unless the shards were written with this tokenizer."""
    written = manifest.tokenizer
    if tokenizer.pieces_sha256 != written.pieces_sha256:
        raise TokenizerError(
            f"the {manifest.split} shards were written with another tokenizer: pieces "
            f"{written.pieces_sha256[:16]} ({written.vocab_size} ids) in the manifest, "
            f"{tokenizer.pieces_sha256[:16]} ({tokenizer.vocab_size} ids) given; use the "
            "tokenizer.model beside the shards"
        )


def describe_position(stream: Stream, tokenizer: Tokenizer, position: int) -> dict[str, Any]:
    """Describe the sequence that a run sees at a global position: epoch, number and text.

    Epoch and place count passes over all budgets together; a mix names the source too. DataError
    for a position outside the run.
    """
    if not 0 <= position < stream.total_positions:
        raise DataError(
            f"position {position:,} is outside the run, which has {stream.total_positions:,} "
            f"({stream.epochs:g} epochs of {stream.sequences_per_epoch:,} sequences)"
        )
    where, sequence = stream.sequences_at(np.array([position]))
    name, part = stream.parts[int(where[0])]
    batch = stream.read(np.array([position]))
    epoch, place = divmod(position, stream.sequences_per_epoch)
    return {
        "position": position,
        "epoch": epoch,
        "place_in_epoch": place,
        "scored_tokens": int(batch.valid.sum()),
        **({"source": name} if name else {}),
        **describe_sequence(part.pool, tokenizer, int(sequence[0]), stream.seq_length),
    }


@dataclass(frozen=True)
class StepPositions:
    """Global positions [start, stop) of one optimizer step, and their origin."""

    step: int
    start: int
    stop: int
    logged: bool
    """True if the log proves that the step was taken; otherwise the positions are a projection."""
    basis: str
    """Origin of the positions for people, with the numbers they follow from."""


def step_positions(
    rows: Iterable[Mapping[str, float]], step: int, batch: int, total_positions: int
) -> StepPositions:
    """Find the positions of `step` (counted from 1) in a run whose log is `rows`.

    A logged interval holds steps of one size, because a start that changes the batch size begins a
    new one. Steps after the log are projected with the present `batch`. DataError when the step
    lies outside the run or the log does not add up.
    """
    if step < 1:
        raise DataError(f"step {step:,} does not exist: steps count from 1")
    last, reached = 0, 0
    for row in rows:
        if "position_stop" not in row:
            continue
        first, last = last, int(row["step"])
        before, start, reached = reached, int(row["position_start"]), int(row["position_stop"])
        if step > last:
            continue
        size, steps = reached - start, last - first
        if first > 0 and start != before:
            steps = 0
        elif start > 0 and first == 0:  # a branch: its earlier steps are in another run's log
            steps = min(steps, -(-size // batch))
        each = _positions_per_step(size, steps, batch, at_end=reached == total_positions)
        if step <= last - steps:
            raise DataError(
                f"step {step:,} is not in this log, which begins at position {start:,} with step "
                f"{last - steps + 1:,}; look into the run that this one continues"
            )
        begin = start + (step - (last - steps) - 1) * each
        basis = f"in the log: steps {last - steps + 1:,} to {last:,} took {start:,} to {reached:,}"
        return StepPositions(step, begin, min(begin + each, reached), logged=True, basis=basis)
    begin = reached + (step - last - 1) * batch
    if begin >= total_positions:
        end = last - (reached - total_positions) // batch
        raise DataError(f"step {step:,} is outside the run, which ends with step {end:,}")
    basis = (
        f"not in the log, which ends with step {last:,} at position {reached:,}: projected with "
        f"the present global batch size of {batch:,}"
    )
    stop = min(begin + batch, total_positions)
    return StepPositions(step, begin, stop, logged=False, basis=basis)


def _positions_per_step(size: int, steps: int, batch: int, *, at_end: bool) -> int:
    """Positions of each step of a logged interval; only the last step of a run may take fewer.

    The last step of a run that was lengthened later stands in the middle of the log.
    """
    fits = (steps - 1) * batch < size <= steps * batch
    if fits and (at_end or size % steps):
        return batch
    if steps < 1 or size % steps:
        raise DataError(
            f"the log does not say which positions each step took: {size:,} in {steps:,} steps; "
            "`epochal data verify --visits RUN` lists what is wrong with it"
        )
    return size // steps


def pool_statistics(pool: TokenPool) -> dict[str, Any]:
    """Statistics of a pool that the manifest does not hold: documents and token frequencies."""
    manifest = pool.manifest
    index = SeparatorIndex(manifest, pool.source.index(manifest), verify=False)
    lengths = np.diff(index.positions.astype(np.int64), prepend=-1) - 1
    counts = np.zeros(manifest.tokenizer.vocab_size, np.int64)
    for start in range(0, pool.num_tokens, manifest.member_tokens):
        stop = min(start + manifest.member_tokens, pool.num_tokens)
        counts += np.bincount(pool.tokens(start, stop), minlength=len(counts))
    names = ("min", "p10", "median", "p90", "max")
    share = counts[counts > 0] / counts.sum()
    quantiles = np.quantile(lengths, [0.0, 0.1, 0.5, 0.9, 1.0]).tolist() if len(lengths) else []
    return {
        "tokens": pool.num_tokens,
        "documents": len(lengths),
        "document_tokens": dict(zip(names, quantiles, strict=False)),
        "bytes_per_token": manifest.bytes_per_token,
        "vocabulary_used": int((counts > 0).sum()),
        "vocabulary_size": len(counts),
        "unigram_entropy_nats": float(-(share * np.log(share)).sum()),
        "most_frequent_ids": np.argsort(-counts)[:20].tolist(),
    }


def describe_sequence(
    pool: TokenPool, tokenizer: Tokenizer, sequence: int, seq_length: int
) -> dict[str, Any]:
    """Describe one sequence of the pool: text with visible special ids, and its documents."""
    if seq_length < 1:
        raise DataError(f"seq_length is {seq_length}; allowed: 1 or more tokens")
    total = -(-pool.num_tokens // seq_length)
    if not 0 <= sequence < total:
        raise DataError(
            f"sequence {sequence:,} does not exist: the pool holds {total:,} sequences of "
            f"{seq_length} tokens"
        )
    start = sequence * seq_length
    tokens = pool.tokens(start, min(start + seq_length, pool.num_tokens))
    segment, separators = segments(tokens[None].astype(np.int64), tokenizer.doc_id)
    starts = np.flatnonzero(np.diff(segment[0], prepend=-1))
    return {
        "sequence": sequence,
        "pool_tokens": [start, start + len(tokens)],
        "documents": int(segment[0, -1]) + 1 if len(tokens) else 0,
        "document_starts": starts.tolist(),
        "separators": np.flatnonzero(separators[0]).tolist(),
        "text": tokenizer.decode_visible(tokens.tolist()),
    }
