"""Opening by location: a mix file is the mixture it describes, on disk and behind a URL."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import BudgetError, DataError, ShardError
from data_pipeline.shards.cache import Cache
from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.mixture import MixtureSource, MixtureStream
from data_pipeline.stream.open_stream import beside, content_hash, open_stream, read_pools
from data_pipeline.stream.stream import TokenStream

PoolMaker = Callable[..., tuple[Path, np.ndarray]]
ENTRIES = [
    {"name": "a", "manifest": "a/manifest.json", "unique_tokens": 3000, "weight": 3},
    {"name": "b", "manifest": "b/manifest.json", "weight": 1, "max_epochs": 9},
]


@pytest.fixture
def folder(make_pool: PoolMaker, tmp_path: Path) -> Path:
    """Two pools beside each other."""
    make_pool(5000, seed=1, name="a")
    make_pool(2000, seed=2, name="b")
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """A web server of that folder."""
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def write_mix(folder: Path, mode: str = "weighted", **changes: Any) -> Path:
    """A mix of both pools; proportional ones carry no weights."""
    sources = [
        {k: v for k, v in entry.items() if k != "weight" or mode == "weighted"} for entry in ENTRIES
    ]
    path = folder / "mix.json"
    path.write_text(json.dumps({"format": "mixture/1", "mode": mode, "sources": sources} | changes))
    return path


def by_hand(folder: Path, mode: Any) -> MixtureStream:
    """The same mixture from its parts."""
    sources = []
    for name, unique, weight in (("a", 3000, 3), ("b", None, 1)):
        pool = TokenPool(folder / name / "manifest.json")
        budget = Budget(unique, 64, pool.num_tokens)
        stream = TokenStream(pool, budget, seed=5, epochs=3)
        sources.append(MixtureSource(name, stream, weight if mode == "weighted" else 1))
    return MixtureStream(sources, mode, seed=5, epochs=3)


@pytest.mark.parametrize("mode", ["proportional", "weighted"])
def test_a_mix_file_is_the_mixture_that_it_describes(folder: Path, mode: str) -> None:
    opened = open_stream(write_mix(folder, mode), seed=5, seq_length=64, epochs=3)
    expected = by_hand(folder, mode)
    assert opened.fingerprint() == expected.fingerprint()
    assert (opened.unique_tokens, opened.sequences_per_epoch) == (5000, 47 + 32)
    assert opened.epochs == pytest.approx(3)
    positions = np.arange(opened.total_positions + 3)
    for ours, theirs in zip(opened.read(positions), expected.read(positions), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_manifest_is_its_budget(folder: Path) -> None:
    manifest = folder / "a" / "manifest.json"
    stream = open_stream(manifest, seed=5, seq_length=64, epochs=2, unique_tokens=1000)
    assert isinstance(stream, TokenStream)
    assert (stream.unique_tokens, stream.sequences_per_epoch, stream.epochs) == (1000, 16, 2)


def test_a_url_gives_the_same_stream_and_fetches_lazily_if_asked(
    folder: Path, server: str, tmp_path: Path
) -> None:
    mix, cache = write_mix(folder), Cache(tmp_path / "cache")
    local = open_stream(mix, seed=5, seq_length=64, epochs=3)
    remote = open_stream(
        f"{server}/mix.json", seed=5, seq_length=64, epochs=3, verify="lazy", cache=cache
    )
    assert not list(cache.folder.glob("*.tar"))
    positions = np.arange(local.total_positions)
    assert np.array_equal(local.read(positions).tokens, remote.read(positions).tokens)
    assert remote.fingerprint() == local.fingerprint()
    assert content_hash(f"{server}/mix.json") == content_hash(mix)
    assert list(cache.folder.glob("*.tar"))


def test_a_window_order_reads_through_a_cache_smaller_than_the_budget(
    folder: Path, server: str, tmp_path: Path
) -> None:
    local = folder / "a" / "manifest.json"
    sizes = [p.stat().st_size for p in (folder / "a").glob("*.tar")]
    limit = 3 * max(sizes)
    assert limit < sum(sizes)
    options: dict[str, Any] = {"seed": 5, "seq_length": 64, "epochs": 2, "order": "window(1)"}
    cache = Cache(tmp_path / "cache", limit)
    remote = open_stream(f"{server}/a/manifest.json", **options, verify="lazy", cache=cache)
    expected = open_stream(local, **options)
    for start in range(0, expected.total_positions, 8):
        positions = np.arange(start, start + 8)
        assert np.array_equal(remote.read(positions).tokens, expected.read(positions).tokens)
        assert sum(p.stat().st_size for p in cache.folder.glob("*.tar")) <= limit


def test_pools_are_read_without_their_shards(folder: Path, server: str) -> None:
    write_mix(folder)
    for shard in folder.glob("*/*.tar"):
        shard.unlink()
    pools = read_pools(f"{server}/mix.json")
    assert [(p.location, p.manifest.tokens, p.unique_tokens) for p in pools] == [
        (f"{server}/a/manifest.json", 5000, 3000),
        (f"{server}/b/manifest.json", 2000, None),
    ]
    with pytest.raises(ShardError, match=r"no manifest at http.*404"):
        read_pools(f"{server}/none.json")


def test_manifests_are_looked_for_beside_the_mix() -> None:
    assert beside("s3://bucket/mixes/m.json", "../a/m.json") == "s3://bucket/a/m.json"
    assert beside("s3://bucket/m.json", "https://host/m.json") == "https://host/m.json"
    assert beside(Path("/x/m.json"), "a/m.json") == Path("/x/a/m.json")
    assert beside(Path("/x/m.json"), "/y/m.json") == Path("/y/m.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "mixture/9"}, r"format: Input should be 'mixture/1'"),
        ({"mode": "random"}, "mode: Input should be 'proportional' or 'weighted'"),
        ({"sources": []}, "sources: .*at least 1 item"),
        ({"sources": [ENTRIES[0], ENTRIES[0]]}, "names must differ"),
        ({"sources": [ENTRIES[0] | {"weight": None}]}, "source a: mode weighted needs a weight"),
        ({"mode": "proportional", "sources": ENTRIES}, "mode proportional takes no weight"),
        ({"sources": [ENTRIES[0] | {"wieght": 1}]}, "sources.0.wieght: Extra"),
        ({"sources": [ENTRIES[0], ENTRIES[0] | {"name": "c"}]}, "unique twice"),
        ({"sources": [ENTRIES[0] | {"manifest": "mix.json"}]}, "names another mix"),
        ({"sources": [ENTRIES[0] | {"unique_tokens": 9000}]}, "larger than the pool"),
        ({"sources": [ENTRIES[0] | {"max_epochs": 2}]}, "max_epochs is 2"),
    ],
)
def test_what_is_wrong_with_a_mix_is_named(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_stream(write_mix(folder, **changes), seed=5, seq_length=64, epochs=3)


def test_a_mix_may_begin_with_a_byte_order_mark_and_has_no_key_twice(folder: Path) -> None:
    mix = write_mix(folder)
    text = mix.read_text()
    expected = open_stream(mix, seed=5, seq_length=64, epochs=3).fingerprint()
    mix.write_text("\ufeff" + text)
    assert open_stream(mix, seed=5, seq_length=64, epochs=3).fingerprint() == expected
    mix.write_text(text.replace('"weight"', '"weight": 1, "weight"', 1))
    with pytest.raises(DataError, match="the key 'weight' stands twice"):
        open_stream(mix, seed=5, seq_length=64, epochs=3)


def test_settings_that_a_mix_cannot_have(folder: Path) -> None:
    with pytest.raises(BudgetError, match=r"set data\.unique_tokens to null"):
        read_pools(write_mix(folder), unique_tokens=100)
    with pytest.raises(DataError, match=r"data\.order is global, not sequential"):
        read_pools(write_mix(folder, "proportional"), order="sequential")
