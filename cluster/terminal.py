"""A run outlives its terminal, a closed pipe behind it and a full disk under its output.

What cannot be written is lost, and nothing else: the run has its log in its folder.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from typing import Any

_NOBODY_READS = (errno.EPIPE, errno.EIO, errno.EBADF)


class _Enduring(io.FileIO):
    """A descriptor whose writes never fail."""

    def write(self, data: Any, /) -> int:
        """Write, or drop `data`; with nobody left to read, everything from now on is dropped."""
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno in _NOBODY_READS:
                _to_null(self.fileno())
            return memoryview(data).nbytes


def outlive_terminal() -> None:
    """From now on let neither a hang-up nor a failed write to standard output end this process."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start: no file of ours may get its number
            _to_null(descriptor)
        elif stream is not getattr(sys, f"__{name}__"):
            continue  # somebody else's stream, which takes what is printed
        raw = io.BufferedWriter(_Enduring(descriptor, "wb", closefd=False))
        enduring = io.TextIOWrapper(
            raw,
            encoding=getattr(stream, "encoding", "utf-8"),
            errors=getattr(stream, "errors", "replace"),
            line_buffering=True,
            write_through=bool(getattr(stream, "write_through", False)),
        )
        setattr(sys, name, enduring)


def _to_null(descriptor: int) -> None:
    """Let a descriptor lead nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
