"""Decompressed files: a truncated or damaged archive is an error, never a shorter text."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import CorpusError

COMPRESSED = (".gz", ".zst")
READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
"""Errors that reading a damaged file may raise."""


def open_decompressed(path: Path) -> BinaryIO | gzip.GzipFile | io.BufferedReader:
    """The bytes of `path`, decompressed when its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(path), 1 << 20)
    return open(path, "rb")


class _ZstdReader(io.RawIOBase):
    """All frames of a file.

    The library's reader ends silently where a file is truncated, and after the first frame.
    """

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise CorpusError(
                f"reading {path} needs zstandard: pip install 'epochal[data]'"
            ) from None
        self._library: Any = zstandard
        self._file = open(path, "rb")  # noqa: SIM115
        self._frame: Any = None
        self._input, self._output = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            block = self._input or self._file.read(1 << 18)
            if not block:
                if self._frame is not None:
                    raise EOFError("the zstd frame is truncated")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._output = self._frame.decompress(block)
            except self._library.ZstdError as error:
                raise OSError(str(error)) from error
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
