"""Web servers on loopback that serve a folder with ranges: nginx, or a plain one that can fail.

usage: servers.py FOLDER PORT LOG
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar


class FileHandler(BaseHTTPRequestHandler):
    """Serves a folder; `faults` says what goes wrong with the next requests of a file."""

    folder: Path
    faults: dict[str, list[str]]
    requests: list[tuple[str, str]]
    """Name and wanted range of every request."""
    log: Path | None = None
    sent: ClassVar[dict[str, int]] = {}
    """Blocks sent by a fault that sends without end."""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        wanted = self.headers.get("Range", "")
        self.requests.append((name, wanted))
        fault = self.faults[name].pop(0) if self.faults.get(name) else ""
        path = self.folder / (name if self.log is None else self.path[1:])
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        data = path.read_bytes()
        if fault == "damage":
            data = data[:1500] + bytes([data[1500] ^ 1]) + data[1501:]
        first = int(wanted[6:-1]) if wanted and fault != "ignore range" else 0
        body, status = data[first:], 206 if first else 200
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f'"GET {self.path} HTTP/1.1" {status} {len(body)}\n')
        if fault.startswith("to "):
            self.send_response(302)
            self.send_header("Location", fault[3:])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault in ("endless", "byte by byte", "slow headers"):
            self.misbehave(fault)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "drop":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    def misbehave(self, fault: str) -> None:
        """Send without end until the client goes away."""
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"\r\n" * (fault != "slow headers"))
        with suppress(OSError):
            while True:
                self.wfile.write(bytes(1 << 16) if fault == "endless" else b"x")
                self.sent[fault] = self.sent.get(fault, 0) + 1
                time.sleep(0.0 if fault == "endless" else 0.02)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""


class WebServer:
    """A server of a folder in a process of its own, with a log of its answers."""

    def __init__(self, folder: Path) -> None:
        self._port, home = free_port(), folder / "server"
        home.mkdir()
        self.url, self._log = f"http://127.0.0.1:{self._port}", home / "access.log"
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        command: list[Any] = [sys.executable, __file__, folder, self._port, self._log]
        if Path(nginx).exists():
            command = [nginx, "-c", home / "nginx.conf", "-p", home]
            (home / "nginx.conf").write_text(
                f"daemon off; master_process off; pid {home}/pid; error_log {home}/error.log;\n"
                f"user {'root' if os.getuid() == 0 else 'nobody'};\n"
                "events {}\n"
                f"http {{ access_log {self._log}; client_body_temp_path {home}/b;\n"
                f"proxy_temp_path {home}/p; fastcgi_temp_path {home}/f; uwsgi_temp_path {home}/u;\n"
                f"scgi_temp_path {home}/s;\n"
                f"server {{ listen 127.0.0.1:{self._port}; root {folder}; }} }}\n"
            )
        self._process = subprocess.Popen([str(word) for word in command])

    def __enter__(self) -> WebServer:
        wait_for(self._port)
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End the server as a crash does."""
        self._process.kill()
        self._process.wait()

    def answers(self, name: str) -> list[tuple[int, int]]:
        """Status and bytes of every answer to requests of a file, in order."""
        line = re.compile(r'"GET \S*/(\S+) HTTP/[\d.]+" (\d+) (\d+)')
        found = line.findall(self._log.read_text())
        return [(int(status), int(size)) for asked, status, size in found if asked == name]


def free_port() -> int:
    """A port of loopback that nobody listens on, below those that the kernel gives to whoever asks
    for any: ranks of a test beside this one take dozens, and could take it before the server."""
    while True:
        port = secrets.randbelow(12_000) + 20_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(port: int) -> None:
    """Return as soon as something listens."""
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"nothing listens on {port}")


if __name__ == "__main__":
    FileHandler.folder, FileHandler.log = Path(sys.argv[1]), Path(sys.argv[3])
    FileHandler.faults, FileHandler.requests = {}, []
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), FileHandler).serve_forever()
