"""Reading http(s) URLs: redirects stay on http(s), credentials come from `.netrc`."""

from __future__ import annotations

import base64
import netrc
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPMessage, HTTPResponse
from typing import IO, Any
from urllib.parse import urlsplit

from data_pipeline.shards.speed import SpeedWatch


class RedirectError(Exception):
    """Redirect that is not followed: to another scheme, from https to http, to no valid URL."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """The library's handler would also follow ftp."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after not in ("http", "https") or (before, after) == ("https", "http"):
            raise RedirectError(f"a redirect from {before} to {after or 'nothing'} is not followed")
        fp.close()  # else the library reads the answer to its end, however long it is
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Watched(urllib.request.AbstractHTTPHandler):
    """Handler whose connections can be shut while their answer is waited for."""

    watch: SpeedWatch

    def do_open(self, http_class: Any, req: Any, **http_conn_args: Any) -> HTTPResponse:
        def connection(*args: Any, **named: Any) -> HTTPConnection:
            made = http_class(*args, **named)
            connect = made.connect

            def connect_and_tell() -> None:
                connect()
                opened = made.sock  # the library takes it from the connection later
                self.watch.stops.append(lambda: opened.shutdown(socket.SHUT_RDWR))

            made.connect = connect_and_tell
            return made

        return super().do_open(connection, req, **http_conn_args)


class _Http(_Watched, urllib.request.HTTPHandler):
    """Watched http."""


class _Https(_Watched, urllib.request.HTTPSHandler):
    """Watched https."""


def open_url(url: str, headers: dict[str, str], timeout: float, watch: SpeedWatch) -> Any:
    """Open a URL; `watch` can end it from then on. Raises RedirectError and urllib's errors."""
    http, https = _Http(), _Https()
    http.watch = https.watch = watch
    request = urllib.request.Request(url, headers=headers)
    if login := _login(urlsplit(url).hostname or ""):
        # Not sent to the target of a redirect.
        request.add_unredirected_header("Authorization", login)
    opener = urllib.request.build_opener(http, https, _Redirects())
    try:
        return opener.open(request, timeout=timeout)
    except ValueError as error:  # from the library's parsing of the address of a redirect, too
        raise RedirectError(
            f"the address, or one that it redirects to, is invalid: {error}"
        ) from None


def blocks(response: Any, size: int, watch: SpeedWatch) -> Iterator[bytes]:
    """Bytes of a response as they come, at most `size` at once."""
    while block := response.read1(size):
        watch.received += len(block)
        yield block


def _login(host: str) -> str | None:
    """Value of the Authorization header for a host in `~/.netrc` (or $NETRC), if it is there."""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    if found is None:
        return None
    return "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()
