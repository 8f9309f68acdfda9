"""Random answers of a web server: the right tokens or an error of this package."""

from __future__ import annotations

import random
import resource
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards.cache import Cache
from data_pipeline.shards.pool import TokenPool
from data_pipeline.shards.remote import RemoteSettings

PoolMaker = Callable[..., tuple[Path, np.ndarray]]
SETTINGS = RemoteSettings(timeout=2, attempts=3, backoff=0.01, min_speed=2000, speed_window=0.5)

STATUSES = [
    b"HTTP/1.1 200 OK", b"HTTP/1.1 206 Partial Content", b"HTTP/1.1 204 No Content",
    b"HTTP/1.1 302 Found", b"HTTP/1.1 308 Permanent", b"HTTP/1.1 100 Continue",
    b"HTTP/1.1 304 Not Modified", b"HTTP/1.1 401 Unauthorized", b"HTTP/1.1 416 Range",
    b"HTTP/1.1 500 Oops", b"HTTP/9.9 200 OK", b"HTTP/1.1 abc", b"HTTP/1.1", b"ICY 200 OK", b"",
    b"\x16\x03\x01\x00", b"HTTP/1.1 200 " + b"x" * 70_000, b"HTTP/1.1 99999 OK", b"HTTP/1.1 -1 OK",
]  # fmt: skip
HEADERS = [
    b"Content-Length: -5", b"Content-Length: 1e9", b"Content-Length: 99999999999999999999",
    b"Content-Length: 3", b"Content-Length:", b"Transfer-Encoding: chunked",
    b"Content-Encoding: gzip", b"Content-Range: bytes 9-1/0", b"no colon at all",
    b": empty name", b"X: \xff\xfe\x00", b"X: " + b"y" * 70_000, b"Location: /manifest.json",
    b"Location: file:///etc/passwd", b"Location: http://[::1", b"Location: http://127.0.0.1:9/",
    b"Location: http://127.0.0.1:x/", b"Location: //", b"Location: \xff\xfe", b"Location: ",
    b"Location: http://" + b"a" * 300 + b"/", b"Location: http://xn--\xc3\xa9/", b"Location: http:///",
    b"Location: ../../../etc/passwd", b"Location: data:text/plain,x", b"Location: http://a b/",
    b"WWW-Authenticate: Basic", b"Retry-After: 99999999", b"Set-Cookie: a=b",
]  # fmt: skip
BODIES = [
    b"", b"{}", b"[]", b"null", b'{"format": "pool/1"}', b"5\r\nhello\r\n0\r\n\r\n", b"-1\r\nx\r\n",
    b"zz\r\nx\r\n0\r\n\r\n", b"fffffffffffffffff\r\nx", b"\x1f\x8b\x08\x00junk", b"[" * 100_000,
    b"\x00" * 5000, b"\xef\xbb\xbf{}", b"9" * 5000,
]  # fmt: skip


class RandomServer(socketserver.ThreadingTCPServer):
    """Server of a folder that answers a part of the requests with random bytes."""

    daemon_threads = True
    folder: Path
    chance: random.Random
    share: float


class Answer(socketserver.StreamRequestHandler):
    """One request."""

    server: RandomServer

    def handle(self) -> None:
        self.connection.settimeout(5)
        with suppress(OSError):
            asked = self.rfile.readline().split()
            while self.rfile.readline().strip():
                pass
            chance = self.server.chance
            if chance.random() < self.server.share:
                self.wfile.write(self._noise(chance))
                time.sleep(chance.choice([0, 0, 0, 0.2]))
                return
            path = self.server.folder / Path(asked[1].decode()).name
            body = path.read_bytes() if path.is_file() else b""
            status = b"200 OK" if path.is_file() else b"404 Not Found"
            length = str(len(body)).encode()
            self.wfile.write(
                b"HTTP/1.1 %s\r\nContent-Length: %s\r\n\r\n%s" % (status, length, body)
            )

    def _noise(self, chance: random.Random) -> bytes:
        headers = chance.sample(HEADERS, chance.randint(0, 3))
        files = sorted(self.server.folder.iterdir())
        body = chance.choice([*BODIES, *(file.read_bytes() for file in files if file.is_file())])
        whole = b"\r\n".join([chance.choice(STATUSES), *headers, b"", body])
        if chance.random() < 0.5:
            changed = bytearray(whole)
            for _ in range(chance.randint(1, 6)):
                if changed:
                    changed[chance.randrange(len(changed))] = chance.randrange(256)
            whole = bytes(changed[: chance.randint(0, len(changed))])
        return whole


@pytest.fixture
def noisy() -> Iterator[tuple[RandomServer, str]]:
    with RandomServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("seed", "number"),
    [(0, 12), *(pytest.param(seed, 60, marks=pytest.mark.slow) for seed in range(1, 6))],
)
def test_random_answers(
    make_pool: PoolMaker, noisy: tuple[RandomServer, str], tmp_path: Path, seed: int, number: int
) -> None:
    manifest, tokens = make_pool()
    server, url = noisy
    server.folder, server.chance = manifest.parent, random.Random(seed)
    outside = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = 0
    for trial in range(number):
        server.share = server.chance.choice([0.1, 0.5, 1.0])
        cache = Cache(tmp_path / "cache" / str(trial), remote=SETTINGS)
        started = time.monotonic()
        try:
            pool = TokenPool(f"{url}/manifest.json", cache=cache)
            assert np.array_equal(pool.tokens(0, pool.num_tokens), tokens)
            whole += 1
        except DataError:
            pass
        assert time.monotonic() - started < 30
    assert 0 < whole < number
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    for path, time_ns in outside.items():
        assert path.is_dir() or path.stat().st_mtime_ns == time_ns
