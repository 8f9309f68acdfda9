"""Verification of a pool: every byte against the manifest, all problems at once.

Opening a pool compares fast hashes; this reads everything once and also checks the tar headers,
the sha256 sums, the member hashes and the document index, so its answer is final.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.errors import DataError, ShardError
from data_pipeline.progress import Progress
from data_pipeline.regular import open_regular, read_regular
from data_pipeline.shards.files import inside
from data_pipeline.shards.manifest import HEADER_BYTES, Manifest, ShardRecord
from data_pipeline.shards.shards import member_header


def find_manifests(path: Path) -> list[Path]:
    """Find the manifests that `path` names: itself, or those of a folder; DataError if none."""
    if path.is_file():
        return [path]
    found = [path / "manifest.json"] if (path / "manifest.json").is_file() else []
    found += sorted(path.glob("*/manifest.json"))
    if not found:
        raise DataError(f"{path} holds no manifest.json; give a manifest or a prepared folder")
    return found


def pool_problems(manifest_path: Path, progress: Progress) -> list[str]:
    """List all problems of one pool; empty when its bytes are those that were written."""
    try:
        manifest = Manifest.load(manifest_path)
    except ShardError as error:
        return [str(error)]
    folder = manifest_path.parent
    total = sum(shard.bytes for shard in manifest.shards)
    progress.start(f"verifying {manifest.split}", total, "bytes")
    problems: list[str] = []
    separators: list[NDArray[np.int64]] = []
    for shard in manifest.shards:
        try:
            path = inside(folder, shard.name)
            problems += _shard_problems(path, shard, manifest, separators)
        except ShardError as error:
            problems.append(str(error))
        except FileNotFoundError:
            problems.append(f"{folder / shard.name}: missing")
        except OSError as error:
            problems.append(f"{folder / shard.name}: {error.strerror or error}")
        progress.advance(shard.bytes)
    listed = {shard.name for shard in manifest.shards}
    extra = {path.name for path in folder.glob("*.tar")} - listed
    problems += [f"{folder / name}: not in the manifest" for name in sorted(extra)]
    known = np.concatenate(separators) if separators and not problems else None
    return problems + list(_index_problems(folder, manifest, known))


def _shard_problems(
    path: Path, record: ShardRecord, manifest: Manifest, separators: list[NDArray[np.int64]]
) -> Iterator[str]:
    """Read a shard member by member, yield its problems, collect the positions of `separators`."""
    size = path.stat().st_size
    if size != record.bytes:
        yield f"{path}: {size:,} bytes instead of {record.bytes:,}"
        return
    whole, fast = sha256(), xxhash.xxh3_128()
    with open_regular(path) as file:
        for inner, expected in enumerate(record.member_xxh3):
            first = record.first + inner * manifest.member_tokens
            count = min(manifest.member_tokens, record.first + record.tokens - first)
            header = file.read(HEADER_BYTES)
            payload = file.read(count * manifest.item_dtype.itemsize)
            padding = file.read(-len(payload) % HEADER_BYTES)
            number = first // manifest.member_tokens
            if header != member_header(number, len(payload)):
                yield f"{path}: header of member {number:09d}.tok.bin is damaged"
            if xxhash.xxh3_64_hexdigest(payload) != expected:
                yield f"{path}: tokens of member {number:09d}.tok.bin are damaged"
            tokens = np.frombuffer(payload, manifest.item_dtype)
            separators.append(first + np.flatnonzero(tokens == manifest.tokenizer.doc_id))
            if tokens.size and int(tokens.max()) >= manifest.tokenizer.vocab_size:
                yield f"{path}: member {number:09d}.tok.bin holds ids outside the vocabulary"
            for block in (header, payload, padding):
                whole.update(block)
                fast.update(block)
        rest = file.read()
        whole.update(rest)
        fast.update(rest)
    if (whole.hexdigest(), fast.hexdigest()) != (record.sha256, record.xxh3):
        yield f"{path}: sha256 {whole.hexdigest()}, manifest says {record.sha256}"


def _index_problems(
    folder: Path, manifest: Manifest, separators: NDArray[np.int64] | None
) -> Iterator[str]:
    """Compare the document index with its hash and with the separators in the tokens."""
    path = folder / manifest.documents.name
    try:
        path = inside(folder, manifest.documents.name)
        content = read_regular(path, 8 * manifest.documents.count)
    except ShardError as error:
        yield str(error)
        return
    except OSError as error:
        yield f"{path}: {error.strerror or error}"
        return
    if sha256(content).hexdigest() != manifest.documents.sha256:
        yield f"{path}: content differs from the manifest"
    elif separators is not None and separators.astype("<u8").tobytes() != content:
        yield f"{path}: does not list the separators that the tokens hold"
