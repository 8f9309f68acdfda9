"""Decompressed files: a truncated or damaged archive is an error, never a shorter text."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from pathlib import Path
from typing import Any

from data_pipeline.errors import CorpusError
from data_pipeline.regular import open_regular

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""Errors that reading a damaged file may raise."""


LARGEST_RATIO = 200
"""Bytes of text from a compressed byte; text gives 3 to 20, a file made to fill a disk 1,000."""
_UNCHECKED = 64 << 20
"""Bytes at the beginning for which the ratio does not count."""
_ZSTD_INPUT = 1 << 10
"""Compressed bytes that are given to zstd at once: four can give 128 KiB, so these give 32 MiB."""

Reader = io.BufferedReader


def open_decompressed(path: Path) -> Reader:
    """The bytes of `path`, decompressed when its name ends in one of COMPRESSED.

    Reading raises one of READ_ERRORS for pipes and devices, damage, and a ratio that no text has.
    """
    file = open_regular(path)
    ending = path.suffix.lower()
    if ending not in COMPRESSED:
        return file
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise EOFError("the file has 0 bytes, and a compressed file has more")
    inner: Any
    match ending:
        case ".gz":
            inner = gzip.GzipFile(fileobj=file)
        case ".bz2":
            inner = bz2.BZ2File(file)
        case ".xz":
            inner = lzma.LZMAFile(file)  # noqa: SIM115
        case _:
            inner = _ZstdReader(path, file)
    return io.BufferedReader(_Limited(inner, file), 1 << 20)


class _Limited(io.RawIOBase):
    """Decompressed bytes of a file, at most `LARGEST_RATIO` for each byte of it."""

    def __init__(self, inner: Any, file: Reader) -> None:
        self._inner, self._file, self._given = inner, file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._inner.readinto(buffer)
        self._given += count
        if self._given > _UNCHECKED and self._given > LARGEST_RATIO * self._file.tell():
            raise OSError(
                f"it expands to more than {LARGEST_RATIO} times its size, as no text does; "
                "decompress it yourself if it is text"
            )
        return count

    def close(self) -> None:
        self._inner.close()
        self._file.close()
        super().close()


class _ZstdReader(io.RawIOBase):
    """All frames of a file.

    The library's reader ends silently where a file is truncated, and after the first frame.
    """

    def __init__(self, path: Path, file: Reader) -> None:
        try:
            import zstandard
        except ImportError:
            raise CorpusError(
                f"reading {path} needs zstandard: pip install 'epochal[data]'"
            ) from None
        self._library: Any = zstandard
        self._file = file
        self._frame: Any = None
        self._input, self._output = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            block = self._input or self._file.read(_ZSTD_INPUT)
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
