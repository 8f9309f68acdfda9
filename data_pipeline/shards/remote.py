"""Downloads from http(s) and s3 by ranges: an interrupted one continues at its last byte.

Each scheme has one function, which appends to a `.part` file; retries, checks and the cache are
built on top. boto3 reads s3 where it is installed; otherwise a command template does, which must
write the object to its standard output.
"""

from __future__ import annotations

import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_pipeline.errors import ShardError

_BLOCK = 1 << 20
SCHEMES = ("http", "https", "s3")


class MissingError(Exception):
    """Refusal by the server: there is no such object, and trying again is useless."""


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
    s3_command: str = "aws s3 cp {url} -"
    """Command for s3 where boto3 is not installed."""


def is_remote(location: str | Path) -> bool:
    """True if a location is a URL of a known scheme."""
    return urlsplit(str(location)).scheme in SCHEMES


def append_rest(url: str, part: Path, settings: RemoteSettings) -> None:
    """Append the bytes of `url` that `part` lacks.

    MissingError for objects that do not exist, TransferError for faults that may pass, OSError for
    the local disk.
    """
    have = part.stat().st_size if part.exists() else 0
    if urlsplit(url).scheme == "s3":
        blocks = _s3_blocks(url, have, settings)
    else:
        blocks = _http_blocks(url, have, settings)
    with open(part, "ab") as file:
        for restart, block in blocks:
            if restart:
                file.truncate(0)
            file.write(block)


def _http_blocks(url: str, have: int, settings: RemoteSettings) -> Iterator[tuple[bool, bytes]]:
    """Yield (restart, bytes) of the response; a server may ignore the range and send everything."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=settings.timeout) as response:
            restart = have > 0 and response.status != 206
            while block := response.read(_BLOCK):
                yield restart, block
                restart = False
            if (left := getattr(response, "length", 0)) and left > 0:
                raise TransferError(f"connection closed {left:,} bytes early")
    except urllib.error.HTTPError as error:
        if error.code == 416:
            yield True, b""
            raise TransferError("the partial download did not fit, starting again") from error
        if error.code in (401, 403, 404, 410):
            raise MissingError(f"HTTP {error.code} {error.reason}") from error
        raise TransferError(f"HTTP {error.code} {error.reason}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise TransferError(str(getattr(error, "reason", error))) from error
    except Exception as error:
        if type(error).__module__ == "http.client":  # IncompleteRead, BadStatusLine, ...
            raise TransferError(repr(error)) from error
        raise


def _s3_blocks(url: str, have: int, settings: RemoteSettings) -> Iterator[tuple[bool, bytes]]:
    """Yield (restart, bytes) of an S3 object by boto3, or by the command without it."""
    try:
        import boto3
    except ImportError:
        yield from _command_blocks(url, have, settings)
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
        for block in answer["Body"].iter_chunks(_BLOCK):
            yield False, block
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code == "InvalidRange":
            yield True, b""
            raise TransferError("the partial download did not fit, starting again") from error
        if code in ("NoSuchKey", "NoSuchBucket", "404", "403", "AccessDenied"):
            raise MissingError(f"S3 {code}") from error
        raise TransferError(f"S3 {code}") from error
    except BotoCoreError as error:
        raise TransferError(str(error)) from error


def _command_blocks(url: str, have: int, settings: RemoteSettings) -> Iterator[tuple[bool, bytes]]:
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
    with process:
        skip = have
        while block := process.stdout.read(_BLOCK):
            yield False, block[skip:]
            skip = max(0, skip - len(block))
        reason = process.stderr.read().decode(errors="replace").strip()[-200:]
    if process.returncode != 0:
        raise TransferError(f"{command[0]} ended with {process.returncode}: {reason}")
