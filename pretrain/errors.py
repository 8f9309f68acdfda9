"""Errors a user can act on, each with the exit code the command line ends with.

A message says what was given, what is allowed and what to change. Programmers' mistakes stay
`assert`s and tracebacks.
"""

from __future__ import annotations


class EpochalError(Exception):
    """Base of every error that is printed without a traceback."""

    exit_code = 1


class ConfigError(EpochalError):
    """The configuration is not usable: unknown key, wrong type, values that do not fit together."""

    exit_code = 2


class TrainingError(EpochalError):
    """The run cannot go on (loss not finite, disk full while saving); nothing saved is lost."""

    exit_code = 5
