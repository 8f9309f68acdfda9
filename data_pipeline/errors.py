"""Errors of corpora, tokenizers, shards and budgets, with the exit code of each."""

from __future__ import annotations


class DataError(Exception):
    """Base of this package's errors; printed without a traceback."""

    exit_code = 2


class CorpusError(DataError):
    """A source is missing, empty or malformed."""


class TokenizerError(DataError):
    """A tokenizer is missing, unusable or not the one the shards were written with."""


class BudgetError(DataError):
    """The unique-token budget does not fit the pool."""


class CursorError(DataError):
    """A resume cursor belongs to other data, another budget or another order."""

    exit_code = 4


class ShardError(DataError):
    """Shards are missing or damaged; the message lists every problem found."""

    exit_code = 3
