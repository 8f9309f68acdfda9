"""Kill a preparation again and again and let it finish: a script, so that every start is a fork.

A fresh interpreter that never trained a tokenizer itself can be forked in a millisecond; importing
everything anew for each of dozens of starts would take a second each.

usage: kill_preparation.py publications|moments SETTINGS_JSON OUT KILLS
Prints the number of kills; leaves one finished folder OUT/N per round.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import sentencepiece  # noqa: F401  (imported before the forks)

from data_pipeline.prepare.prepare import prepare
from data_pipeline.prepare.settings import PrepareSettings
from data_pipeline.shards import files


def run_in_child(work: Callable[[], object]) -> int:
    """Fork and run `work`; the child's process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def was_killed(child: int) -> bool:
    """Wait for the child; whether it was killed (any other failure ends the script)."""
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        sys.exit(f"a start failed with exit code {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status)


def kill_at_publication(settings: PrepareSettings, number: int, *, before: bool) -> None:
    """Prepare, and die just before or after the `number`-th file gets its name."""
    publish, count = files.publish, 0

    def counting(temporary: Path, path: Path) -> None:
        nonlocal count
        count += 1
        if count == number and before:
            os.kill(os.getpid(), signal.SIGKILL)
        publish(temporary, path)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    files.publish = counting
    prepare(settings)


def main(mode: str, settings_json: str, out: str, wanted: int) -> None:
    """Rounds of kills until there were enough."""
    base, rng = PrepareSettings.model_validate_json(settings_json), random.Random(3)
    started = time.monotonic()
    assert not was_killed(run_in_child(lambda: prepare(base)))
    duration, kills, attempt = time.monotonic() - started, 0, 0
    while kills < wanted:
        settings = base.model_copy(update={"out": Path(out) / str(attempt)})
        attempt += 1
        killed = True
        while killed:
            if mode == "publications":
                number, before = rng.randint(1, 9), rng.random() < 0.5
                child = run_in_child(
                    lambda s=settings, n=number, b=before: kill_at_publication(s, n, before=b)
                )
            else:
                child = run_in_child(lambda s=settings: prepare(s))
                time.sleep(rng.random() * duration)
                os.kill(child, signal.SIGKILL)
            killed = was_killed(child)
            kills += killed
            if (settings.out / "report.json").exists():
                break
        assert not was_killed(run_in_child(lambda s=settings: prepare(s)))
    print(kills)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
