"""Errors of starting and watching ranks that a user can act on, with the exit code they end with.

A message says what was given, what is allowed and what to change.
"""

from __future__ import annotations


class ClusterError(Exception):
    """Hosts, devices or a run folder that cannot be used as asked; printed without a traceback."""

    exit_code = 2


class LaunchError(ClusterError):
    """Ranks could not be started, or died without a statement (killed, out of memory)."""

    exit_code = 6


class FolderInUseError(ClusterError):
    """Another process trains in the run folder; nothing in it was changed."""


class SilentRankError(LaunchError):
    """Ranks did not answer the others in time."""


EXIT_PREEMPTED = 75
"""Stopped by a signal after saving; start the same command again to go on (EX_TEMPFAIL)."""
