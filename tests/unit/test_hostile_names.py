"""No name in a manifest leads out of its folder, whoever wrote the manifest.

One table of names for every place that joins a name to a folder. Where the manifest carries the
name, its hashes are right: an attacker computes them as we do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from forging import RUN, Change, forge_checkpoint, forge_pool

from data_pipeline.errors import DataError, ShardError
from data_pipeline.prepare.prepare import _tokenizer_of
from data_pipeline.progress import Silent
from data_pipeline.shards.cache import Cache, RemoteFile
from data_pipeline.shards.files import inside as inside_data
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pool import TokenPool
from data_pipeline.shards.verify import pool_problems
from data_pipeline.stream.open_stream import beside
from parallel.checkpoint import read_manifest, reshard_checkpoint, verify_checkpoint
from parallel.errors import CheckpointError
from parallel.files import inside as inside_parallel
from pretrain.checkpoints import export_checkpoint

HOSTILE = {
    "parent": "../evil.tar",
    "two parents": "../../.bashrc",
    "absolute": "/tmp/evil.tar",
    "folder": "sub/evil.tar",
    "backslash": "..\\evil.tar",
    "this folder": ".",
    "parent alone": "..",
    "empty": "",
    "hidden": ".bashrc",
    "option": "-rf",
    "nul": "a\0b.tar",
    "newline": "a\nb.tar",
    "escape": "\x1b[2J.tar",
    "right to left": "a\u202erat.tar",
    "half a surrogate pair": "a\ud800.tar",
    "long": "a" * 201,
}
names = pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())


def with_name(name: str) -> Change:
    """Change of a checkpoint: its optimizer state is in a file of this name."""
    old = "optimizer-00000.safetensors"

    def change(content: dict[str, Any]) -> None:
        content["files"][name] = content["files"].pop(old)
        content["tensors"] = {k: name if f == old else f for k, f in content["tensors"].items()}

    return change


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server of the folder `web`, whose answer to any name is its manifest."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Stay quiet."""

    handler = partial(Handler, directory=tmp_path / "web")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


@names
def test_no_name_leaves_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="cannot be a file in"):
        inside_data(tmp_path, name)
    with pytest.raises(CheckpointError, match="cannot be a file in"):
        inside_parallel(tmp_path, name)
    assert inside_data(tmp_path, "a-1.tar") == inside_parallel(tmp_path, "a-1.tar")


def test_no_link_leaves_its_folder(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_text("text")
    (tmp_path / "root" / "a.tar").symlink_to("../secret")
    (tmp_path / "link").symlink_to("root")
    for inside, error in ((inside_data, ShardError), (inside_parallel, CheckpointError)):
        with pytest.raises(error, match="outside its folder"):
            inside(tmp_path / "root", "a.tar")
        assert inside(tmp_path / "link", "b.tar") == tmp_path / "link" / "b.tar"


@names
def test_a_pool_with_such_a_name_is_refused(name: str, tmp_path: Path) -> None:
    def shard(content: dict[str, Any]) -> None:
        content["shards"][0]["name"] = name

    def index(content: dict[str, Any]) -> None:
        content["documents"]["name"] = name

    for place, change in (("shards.0.name", shard), ("documents.name", index)):
        manifest = forge_pool(tmp_path / place, change)
        with pytest.raises(ShardError, match=f"{place}: a file name"):
            TokenPool(manifest)
        assert place in pool_problems(manifest, Silent())[0]


@pytest.mark.parametrize("key", ["name", "sha256"])
def test_a_remote_pool_writes_nothing_outside_the_cache(
    key: str, server: str, tmp_path: Path
) -> None:
    manifest = forge_pool(
        tmp_path / "web", lambda content: content["shards"][0].update({key: "../x"})
    )
    before = files_below(tmp_path)
    with pytest.raises(ShardError, match=rf"shards\.0\.{key}"):
        TokenPool(f"{server}/{manifest.name}", cache=Cache(tmp_path / "cache"))
    assert files_below(tmp_path) == before


@names
def test_the_cache_refuses_it_too(name: str, tmp_path: Path) -> None:
    file = RemoteFile("http://127.0.0.1:1/x", f"{name}/", 1, "0" * 64)
    with pytest.raises(ShardError, match="cannot be a file in"), Cache(tmp_path).pinned(file):
        pass
    assert not list(tmp_path.iterdir())


@names
def test_a_checkpoint_with_such_a_name_is_neither_copied_nor_exported(
    name: str, tmp_path: Path
) -> None:
    path = forge_checkpoint(tmp_path / "foreign", with_name(name))
    before = files_below(tmp_path)
    uses: list[Callable[[], object]] = [
        lambda: read_manifest(path),
        lambda: verify_checkpoint(path),
        lambda: reshard_checkpoint(path, tmp_path / "copy"),
        lambda: export_checkpoint(path, tmp_path / "weights.safetensors"),
    ]
    for use in uses:
        with pytest.raises(CheckpointError, match=r"a file name|cannot be a file|files: "):
            use()
    assert files_below(tmp_path) == before


def test_a_step_is_a_number_and_no_path(tmp_path: Path) -> None:
    for number, step in enumerate(("../../x", -1, 1.5, True, 2**60)):
        path = forge_checkpoint(tmp_path / str(number), lambda c, step=step: c.update(step=step))
        with pytest.raises(CheckpointError, match="step: Input should be"):
            reshard_checkpoint(path, tmp_path / "copy")


def test_a_report_names_a_tokenizer_beside_it(tmp_path: Path) -> None:
    for name in HOSTILE.values():
        with pytest.raises(ShardError, match="cannot be a file in"):
            _tokenizer_of(tmp_path, {"tokenizer": {"file": name}})
    with pytest.raises(DataError, match="names no tokenizer"):
        _tokenizer_of(tmp_path, {"tokenizer": []})


def test_a_mix_behind_a_url_names_no_path_of_this_machine() -> None:
    with pytest.raises(DataError, match="a path of this machine"):
        beside("https://host/mix.json", "/etc/manifest.json")
    assert beside("https://host/a/mix.json", "../../../b/m.json") == "https://host/b/m.json"


def test_what_an_earlier_version_wrote_is_read(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        assert not pool_problems(RUN / "pool" / split / "manifest.json", Silent())
    forged = forge_pool(tmp_path / "same", lambda content: None)
    assert Manifest.load(forged).sha256 == Manifest.load(RUN / "pool/train/manifest.json").sha256
    copied = reshard_checkpoint(RUN / "checkpoints" / "step-00000008", tmp_path / "copy", files=2)
    assert verify_checkpoint(copied).step == 8
