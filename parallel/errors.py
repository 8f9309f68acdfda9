"""Errors of layouts and checkpoints that a user can act on, with the exit code they end with."""

from __future__ import annotations


class ParallelError(Exception):
    """Base of this package's errors; printed without a traceback."""

    exit_code = 2


class LayoutError(ParallelError):
    """The degrees of parallelism do not fit together, the machine or the model."""

    exit_code = 2


class OptimizerError(ParallelError):
    """An optimizer keeps another state than it declares, so that checkpoints would be wrong."""

    exit_code = 2


class CheckpointError(ParallelError):
    """A checkpoint is missing, damaged or was written by another configuration."""

    exit_code = 4


class SaveError(ParallelError):
    """A checkpoint could not be written (full disk, no permission); earlier ones are untouched."""

    exit_code = 5
