"""Errors that blame a silent rank; tests/distributed/test_resilience.py has real ones."""

from __future__ import annotations

from parallel.silence import gave_up


def test_nobody_is_blamed_before_the_ranks_have_met() -> None:
    """The rendezvous itself times out where a rank never comes; who it was is not known."""
    assert not gave_up(RuntimeError("timed out after 30s waiting for clients. 1/2 clients joined."))
