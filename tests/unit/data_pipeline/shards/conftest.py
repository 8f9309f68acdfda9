"""Web servers of the test's folder: one that works, one that misbehaves."""

from __future__ import annotations

import socketserver
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `servers`, for the tests beside this file

from servers import FileHandler, WebServer


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    """A server of tmp_path in a process of its own: nginx where it is installed."""
    with WebServer(tmp_path) as server:
        yield server


@pytest.fixture
def bad_server() -> Iterator[tuple[type[FileHandler], str]]:
    """A handler class, whose `folder` and `faults` the test sets, and its URL."""
    handler = type("Handler", (FileHandler,), {"faults": {}, "requests": []})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield handler, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
