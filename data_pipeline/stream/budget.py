"""The unique-token budget: the first U tokens of a pool as sequences of S tokens.

A pool holds its documents in keyed order, so every prefix is a uniform sample of documents and
smaller budgets are subsets of larger ones. U is exact to the token: when S does not divide it, the
last sequence keeps U mod S valid positions and the rest is invalid.
"""

from __future__ import annotations

from data_pipeline.errors import BudgetError


def total_positions(sequences: int, epochs: float) -> int:
    """Count the positions of a run over so many sequences; fractional epochs are rounded."""
    return max(1, round(sequences * epochs))


class Budget:
    """U unique tokens as n = ceil(U / S) sequences, counted in target positions."""

    def __init__(self, unique_tokens: int | None, seq_length: int, pool_tokens: int) -> None:
        """Take the whole pool where `unique_tokens` is None; BudgetError if it holds too few."""
        if seq_length < 1:
            raise BudgetError(f"seq_length {seq_length} is not a positive number of tokens")
        tokens = pool_tokens if unique_tokens is None else unique_tokens
        if tokens < 1:
            raise BudgetError(
                f"unique_tokens {tokens:,} is empty: give at least 1 token "
                f"(the pool holds {pool_tokens:,})"
            )
        if tokens > pool_tokens:
            raise BudgetError(
                f"unique_tokens {tokens:,} is larger than the pool of {pool_tokens:,} tokens: "
                f"lower data.unique_tokens to at most {pool_tokens}, or prepare more text"
            )
        self.unique_tokens: int = tokens
        """U."""
        self.seq_length: int = seq_length
        """S."""
        self.sequences: int = -(-tokens // seq_length)
        """n."""
        self.tail_tokens: int = tokens - (self.sequences - 1) * seq_length
        """Valid positions of the last sequence, 1..S."""
