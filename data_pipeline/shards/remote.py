"""Downloads from http(s) and s3 by ranges: an interrupted one continues at its last byte.

Each scheme has one function, which yields blocks; `append_rest` appends them to a `.part` file, and
stops a server that sends more than is wanted or too slowly. Retries, checks and the cache are built
on top. boto3 reads s3 where it is installed; otherwise a command template does, which must
write the object to its standard output.
"""

from __future__ import annotations

import os
import socket
import subprocess
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from data_pipeline.errors import ShardError
from data_pipeline.shards.speed import SpeedWatch
from data_pipeline.shards.web import RedirectError, blocks, open_url

_BLOCK = 1 << 20
_S3_BLOCK = 1 << 16
SCHEMES = ("http", "https", "s3")


class MissingError(Exception):
    """Refusal by the server: there is no such object, and trying again is useless."""


class TooLargeError(Exception):
    """Answer that is longer than the file may be."""


class TransferError(Exception):
    """Failure of a transfer that may pass: trying again is useful."""


@dataclass(frozen=True)
class RemoteSettings:
    """Settings of downloads: timeout, retries, command for s3."""

    timeout: float = 30.0
    """Seconds without an answer after which a connection counts as lost."""
    attempts: int = 6
    """Transfers of one file before giving up; each continues at the end of the last one."""
    backoff: float = 0.5
    """Seconds before the second attempt; doubles each time, up to 30."""
    min_speed: float = 10_000.0
    """Bytes a second that a transfer must bring; a slower one is ended and counts as an attempt."""
    speed_window: float = 60.0
    """Seconds over which the speed is measured, the wait for the first byte included."""
    s3_command: str = "aws s3 cp {url} -"
    """Command for s3 where boto3 is not installed."""


def is_remote(location: str | Path) -> bool:
    """True if a location is a URL of a known scheme."""
    return urlsplit(str(location)).scheme in SCHEMES


def append_rest(url: str, part: Path, settings: RemoteSettings, limit: int) -> None:
    """Append the bytes of `url` that `part` lacks, at most up to `limit` bytes in all.

    MissingError for objects that do not exist, TooLargeError for those that are longer,
    TransferError for faults that may pass, OSError for the local disk.
    """
    check_url(url)
    have = part.stat().st_size if part.exists() else 0
    read = _s3_blocks if urlsplit(url).scheme == "s3" else _http_blocks
    with open(part, "ab") as file, SpeedWatch(settings.min_speed, settings.speed_window) as watch:
        try:
            for restart, block in read(url, have, settings, watch):
                if restart:
                    file.truncate(0)
                    have = 0
                have += len(block)
                if have > limit:
                    raise TooLargeError(f"more than the {limit:,} bytes that it may have")
                file.write(block)
        except TransferError as error:
            raise _too_slow(settings) if watch.slow else error from None
        if watch.slow:
            raise _too_slow(settings)


def _too_slow(settings: RemoteSettings) -> TransferError:
    return TransferError(
        f"slower than {settings.min_speed:,.0f} bytes a second for {settings.speed_window:g} s"
    )


def check_url(url: str) -> None:
    """Raise ShardError for a URL that carries a user or password."""
    if "@" in urlsplit(url).netloc:
        raise ShardError(
            f"{without_secrets(url)} carries a user or password, which would end up in logs and "
            "configurations; put them into ~/.netrc (http) or the environment (s3)"
        )


def without_secrets(url: str) -> str:
    """Copy of a URL with the user, password and query replaced, for messages."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    netloc = f"***@{host}" if "@" in parts.netloc else host
    return urlunsplit(parts._replace(netloc=netloc, query="***" if parts.query else ""))


def _http_blocks(
    url: str, have: int, settings: RemoteSettings, watch: SpeedWatch
) -> Iterator[tuple[bool, bytes]]:
    """Yield (restart, bytes) of the response; a server may ignore the range and send everything."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        with open_url(url, headers, settings.timeout, watch) as response:
            restart = have > 0 and response.status != 206
            for block in blocks(response, _BLOCK, watch):
                yield restart, block
                restart = False
            if (left := getattr(response, "length", 0)) and left > 0:
                raise TransferError(f"connection closed {left:,} bytes early")
    except RedirectError as error:
        raise MissingError(str(error)) from error
    except urllib.error.HTTPError as error:
        if error.code == 416:
            yield True, b""
            raise TransferError("the partial download did not fit, starting again") from error
        if error.code in (401, 403, 404, 410):
            raise MissingError(
                f"HTTP {error.code} {error.reason}; the file is not there"
            ) from error
        raise TransferError(f"HTTP {error.code} {error.reason}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise TransferError(str(getattr(error, "reason", error))) from error
    except Exception as error:
        if type(error).__module__ == "http.client":  # IncompleteRead, BadStatusLine, ...
            raise TransferError(repr(error)) from error
        if watch.slow:  # a connection that was shut while it was read fails in several ways
            raise TransferError(str(error)) from error
        raise


def _s3_blocks(
    url: str, have: int, settings: RemoteSettings, watch: SpeedWatch
) -> Iterator[tuple[bool, bytes]]:
    """Yield (restart, bytes) of an S3 object by boto3, or by the command without it."""
    try:
        import boto3
    except ImportError:
        yield from _command_blocks(url, have, settings, watch)
        return
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    parts = urlsplit(url)
    config = Config(
        connect_timeout=settings.timeout,
        read_timeout=settings.timeout,
        retries={"max_attempts": 1},
    )
    options: dict[str, Any] = {"Range": f"bytes={have}-"} if have else {}
    try:
        client = boto3.client("s3", config=config)
        answer = client.get_object(Bucket=parts.netloc, Key=parts.path.lstrip("/"), **options)
        watch.stops.append(lambda: _shut(answer["Body"]))
        for block in answer["Body"].iter_chunks(_S3_BLOCK):
            watch.received += len(block)
            yield False, block
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code == "InvalidRange":
            yield True, b""
            raise TransferError("the partial download did not fit, starting again") from error
        if code in ("NoSuchKey", "NoSuchBucket", "404", "403", "AccessDenied"):
            raise MissingError(f"S3 {code}; the file is not there") from error
        raise TransferError(f"S3 {code}") from error
    except BotoCoreError as error:
        raise TransferError(str(error)) from error
    except Exception as error:
        if watch.slow:  # a connection that was shut while it was read fails in several ways
            raise TransferError(str(error)) from error
        raise


def _shut(body: Any) -> None:
    """Shut the connection of a response of boto3, whose `close` would wait for its reader."""
    connection = getattr(getattr(body, "_raw_stream", None), "_connection", None)
    if (opened := getattr(connection, "sock", None)) is not None:
        opened.shutdown(socket.SHUT_RDWR)


def _command_blocks(
    url: str, have: int, settings: RemoteSettings, watch: SpeedWatch
) -> Iterator[tuple[bool, bytes]]:
    """Yield the command's output after its first `have` bytes; it runs without a shell."""
    command = [word.format(url=url) for word in settings.s3_command.split()]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        raise ShardError(
            f"reading {url} needs boto3 (pip install 'epochal[data]') or the command "
            f"{command[0]!r}: {error.strerror}"
        ) from error
    assert process.stdout is not None
    assert process.stderr is not None
    watch.stops.append(process.kill)
    with process:
        skip = have
        while block := os.read(process.stdout.fileno(), _BLOCK):
            watch.received += len(block)
            yield False, block[skip:]
            skip = max(0, skip - len(block))
        reason = process.stderr.read().decode(errors="replace").strip()[-200:]
    if process.returncode != 0:
        raise TransferError(f"{command[0]} ended with {process.returncode}: {reason}")
