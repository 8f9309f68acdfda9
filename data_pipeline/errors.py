"""Errors of corpora, tokenizers, shards and budgets, with the exit code of each."""

from __future__ import annotations


class DataError(Exception):
    """Base of this package's errors, which are printed without a traceback."""

    exit_code = 2


class CorpusError(DataError):
    """Missing, empty or malformed source."""


class TokenizerError(DataError):
    """Missing or unusable tokenizer, or one that the shards were not written with."""


class BudgetError(DataError):
    """Unique-token budget that does not fit the pool."""


class CursorError(DataError):
    """Resume cursor of other data, another budget or another order."""

    exit_code = 4


class ShardError(DataError):
    """Missing or damaged shards; the message lists every problem found."""

    exit_code = 3
