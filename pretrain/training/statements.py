"""Statements of a rank that cannot go on: what it met, in words that a user can act on."""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.errors import EXIT_PREEMPTED, FolderInUseError, SilentRankError
from cluster.status import read_status, write_failure, write_first_failure, write_status
from parallel.runtime import read_environment
from pretrain.config.run import Config


def explained(error: Exception, config: Config) -> Exception:
    """The error, or the ranks that did not answer where a collective waited too long for them."""
    from parallel.silence import gave_up, silent_ranks

    if not gave_up(error):
        return error
    silent = silent_ranks()
    who = f"rank {', '.join(map(str, silent))}" if silent else "a rank"
    return SilentRankError(
        f"{who} did not answer within {config.parallel.timeout_minutes:g} minutes "
        "(parallel.timeout_minutes): it was stopped, is stuck, or its machine is unreachable; "
        "checkpoints are intact, start the same command again to resume"
    )


def state_early_stop(config: Config | None, signal_name: str) -> int:
    """State that a signal came before training began."""
    message = f"{signal_name} before training began; nothing had to be saved"
    if config is not None and config.run.path.is_dir() and read_environment().rank == 0:
        earlier = read_status(config.run.path)
        step = earlier["step"] if earlier else 0
        write_status(
            config.run.path, "preempted", step=step, message=message, exit_code=EXIT_PREEMPTED
        )
    print(message, file=sys.stderr, flush=True)
    return EXIT_PREEMPTED


def state_failure(run: Path, rank: int, error: Exception) -> bool:
    """Leave the error of this rank in the run folder; False where it is not this run's."""
    if not run.is_dir() or isinstance(error, FolderInUseError):
        return False
    if rank == 0:
        write_failure(run, error)
    else:
        write_first_failure(run, rank, error)
    return True
