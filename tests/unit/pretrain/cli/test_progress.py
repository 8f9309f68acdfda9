"""What a log says about a long job."""

from __future__ import annotations

import pytest

from pretrain.cli.progress import LogProgress


def test_a_stage_that_counts_nothing_reports_its_time_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with LogProgress(interval=float("inf")) as progress:
        progress.start("training", None, "")
        progress.start("tokenising", 3, "buckets")
        progress.advance(3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("training: done in") and lines[1].endswith(" s")
    assert lines[3].startswith("tokenising: done in") and "3/3 buckets" in lines[3]
