"""User errors, each with the exit code of the command line.

A message says what was given, what is allowed and what to change. Programmers' mistakes stay
`assert`s and tracebacks.
"""

from __future__ import annotations


class EpochalError(Exception):
    """Base of every error that is printed without a traceback."""

    exit_code = 1


class ConfigError(EpochalError):
    """Unusable configuration: unknown key, wrong type, values that do not fit together."""

    exit_code = 2


class TrainingError(EpochalError):
    """End of a run that cannot continue (loss not finite, full disk); saved checkpoints remain."""

    exit_code = 5
