"""First stage of a preparation: documents into sorted runs, the input of an external merge.

Each run file holds documents sorted by a keyed hash of their content, with an index of the places
where buckets of keys begin. A bucket, put together from all runs, is sorted again in memory;
buckets in sequence are then the whole corpus in keyed order, whatever its size. Copies of a text
share their key, so they meet in one bucket and exact deduplication needs no global table.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path
from typing import Any

from data_pipeline.corpus.document import BadRecord, Unit, printable
from data_pipeline.corpus.source import SourceSettings
from data_pipeline.corpus.units import read_unit
from data_pipeline.shards.files import atomic_file, write_atomically

_HEAD = struct.Struct("<8s16sQII")
RUN_BYTES = 64_000_000
EXAMPLES = 5


def content_key(text: bytes) -> bytes:
    """Key of a text, 16 bytes: equal texts have equal keys."""
    return blake2b(text, digest_size=16).digest()


def order_key(content: bytes, seed: int) -> bytes:
    """Sorting key of a document, 8 bytes: a hash of its content key under `seed`."""
    return blake2b(content, digest_size=8, key=struct.pack("<Q", seed)).digest()


def split_hash(content: bytes) -> int:
    """Unsigned 64-bit hash of a content key, which alone decides the split."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big")


@dataclass(frozen=True)
class CollectJob:
    """Job of reading one unit into runs."""

    unit: Unit
    number: int
    source: SourceSettings
    seed: int
    buckets: int
    folder: str
    skip_bad: int
    run_bytes: int = RUN_BYTES


@dataclass(frozen=True)
class Record:
    """One document in a run, with its keys."""

    order: bytes
    content: bytes
    unit: int
    number: int
    id: str
    text: bytes


def bucket_of(order: bytes, buckets: int) -> int:
    """Bucket of an order key; ascending with the key."""
    return int.from_bytes(order[:4], "big") * buckets >> 32


def collect_unit(job: CollectJob) -> dict[str, Any]:
    """Write the runs of one unit and return its counts; a finished unit is not read again."""
    done = Path(job.folder) / f"{job.number:06d}.json"
    if done.exists():
        return json.loads(done.read_text())
    counts = {"documents": 0, "bytes": 0, "empty": 0, "bad": 0, "source": job.unit.source}
    bad: list[str] = []
    runs: list[str] = []
    held: list[tuple[bytes, bytes, int, bytes, bytes]] = []
    size = 0
    for number, item in enumerate(read_unit(job.unit, job.source)):
        if isinstance(item, BadRecord):
            counts["bad"] += 1
            bad += [printable(f"{item.place}: {item.reason}")] if len(bad) < EXAMPLES else []
            if counts["bad"] > job.skip_bad:
                break
            continue
        text = item.text.encode()
        if not text.strip():
            counts["empty"] += 1
            continue
        content = content_key(text)
        held.append((order_key(content, job.seed), content, number, item.id.encode(), text))
        counts["documents"] += 1
        counts["bytes"] += len(text)
        size += len(text)
        if size >= job.run_bytes:
            runs.append(_write_run(job, len(runs), held))
            held, size = [], 0
    if held:
        runs.append(_write_run(job, len(runs), held))
    result = {**counts, "examples": bad, "runs": runs, "label": job.unit.label}
    if counts["bad"] <= job.skip_bad:
        write_atomically(done, json.dumps(result))
    return result


def _write_run(
    job: CollectJob, number: int, held: list[tuple[bytes, bytes, int, bytes, bytes]]
) -> str:
    """Sort and write documents, then the bucket index; return the run's name."""
    name = f"{job.number:06d}-{number:05d}.run"
    path = Path(job.folder) / name
    held.sort(key=itemgetter(0, 1, 2))
    starts = [0] * (job.buckets + 1)
    with atomic_file(path) as file:
        for order, content, place, name_bytes, text in held:
            head = _HEAD.pack(order, content, place, len(name_bytes), len(text))
            starts[bucket_of(order, job.buckets) + 1] += len(head) + len(name_bytes) + len(text)
            file.write(head + name_bytes + text)
        for bucket in range(job.buckets):
            starts[bucket + 1] += starts[bucket]
        file.write(struct.pack(f"<{job.buckets + 1}Q", *starts))
    return name


def read_bucket(
    folder: Path, runs: list[tuple[int, str]], bucket: int, buckets: int
) -> list[Record]:
    """Read the documents of a bucket from all `runs`, (unit number, run name), in keyed order.

    Copies of one text are neighbours, the first one read coming first.
    """
    records = [r for unit, name in runs for r in _read_run(folder / name, unit, bucket, buckets)]
    records.sort(key=lambda r: (r.order, r.content, r.unit, r.number))
    return records


def _read_run(path: Path, unit: int, bucket: int, buckets: int) -> Iterator[Record]:
    """Documents of one bucket in one run."""
    index = struct.Struct("<2Q")
    with open(path, "rb") as file:
        file.seek(-8 * (buckets + 1 - bucket), os.SEEK_END)
        start, stop = index.unpack(file.read(index.size))
        file.seek(start)
        data = file.read(stop - start)
    place = 0
    while place < len(data):
        order, content, number, name_size, text_size = _HEAD.unpack_from(data, place)
        place += _HEAD.size
        name = data[place : place + name_size].decode()
        place += name_size
        yield Record(order, content, unit, number, name, data[place : place + text_size])
        place += text_size
