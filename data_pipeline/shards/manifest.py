"""The manifest of a pool: the content of its shards, and the hash that is the data's identity.

Nothing in it depends on the machine, the time or the number of processes that prepared it, so the
same text and settings give the same hash everywhere. One string then says which data a run used.
"""

from __future__ import annotations

import json
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import ShardError

FORMAT: Final = "tokens-tar/1"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerRecord(_Record):
    """The tokenizer that the ids belong to."""

    kind: Literal["sentencepiece", "huggingface"]
    sha256: str
    """Hash of the file (transport)."""
    pieces_sha256: str
    """Hash of pieces, scores and normaliser (identity)."""
    vocab_size: int
    pad_id: int
    mask_id: int
    doc_id: int
    never_targets: tuple[int, ...]
    """Ids that no target can take."""


class PackingRecord(_Record):
    """The way documents became one array of tokens."""

    separator: Literal["after"] = "after"
    """Every document is followed by `doc_id`."""
    document_order: Literal["keyed-hash"] = "keyed-hash"
    seed: int
    """Key of the document order."""
    unit: Literal["document"] = "document"
    """Documents are encoded whole, never split first: splitting changes unigram ids."""


class SourceRecord(_Record):
    """Share of one source in this split."""

    name: str
    license: str
    documents: int
    raw_bytes: int
    """UTF-8 bytes of the text."""
    tokens: int
    """Tokens including one separator a document."""


class SplitRule(_Record):
    """Rule of the split: validation takes the documents whose content hash is below a threshold."""

    hash: Literal["blake2b-8(content key)"] = "blake2b-8(content key)"
    validation_below: str
    """Threshold of the unsigned 64-bit hash, hexadecimal."""


class RoundTrip(_Record):
    """Result of decoding every document and comparing it with its text."""

    checked: int
    failed: int
    """Documents whose text differs after decode(encode(text))."""
    examples: tuple[str, ...] = ()
    """Ids of some documents that failed."""


class ShardRecord(_Record):
    """One tar file of members with `member_tokens` tokens each; the pool's last one is shorter."""

    name: str
    bytes: int
    tokens: int
    first: int
    """Pool position of the first token."""
    sha256: str
    xxh3: str
    """xxh3-128 of the file: the fast check at open."""
    member_xxh3: tuple[str, ...]
    """xxh3-64 of each member's payload: checks single members, lazily or over the network."""


class DocumentIndex(_Record):
    """The file `documents.bin`: pool positions of all separators, ascending, as `<u8`."""

    name: str = "documents.bin"
    count: int
    sha256: str


class Manifest(_Record):
    """Description of one pool (one split): all that a reader needs to know."""

    format: Literal["tokens-tar/1"] = FORMAT
    split: Literal["train", "validation"]
    dtype: Literal["<u2", "<u4"]
    tokens: int
    """Tokens of the pool, separators included; all of them may be targets."""
    raw_bytes: int
    """UTF-8 bytes of the text that the tokens encode (separators encode none)."""
    member_tokens: int
    members_per_shard: int
    tokenizer: TokenizerRecord
    packing: PackingRecord
    split_rule: SplitRule
    round_trip: RoundTrip
    sources: tuple[SourceRecord, ...]
    shards: tuple[ShardRecord, ...]
    documents: DocumentIndex

    @staticmethod
    def load(path: Path) -> Manifest:
        """Read `path`; ShardError if it is missing, not a manifest or damaged."""
        return Manifest.parse(read_local(Path(path)), str(path))

    @staticmethod
    def parse(text: str, origin: str) -> Manifest:
        """Validate the JSON `text` read from `origin`; ShardError if it is no whole manifest."""
        try:
            content: dict[str, Any] = json.loads(text)
            stored = content.pop("manifest_sha256", None)
            manifest = Manifest.model_validate(content)
        except (ValueError, TypeError, AttributeError, ValidationError) as error:
            raise ShardError(f"{origin} is not a {FORMAT} manifest: {error}") from error
        if stored != manifest.sha256:
            raise ShardError(
                f"{origin} was changed after it was written: its content hashes to "
                f"{manifest.sha256}, it says {stored}; fetch it again or prepare the data again"
            )
        manifest.check_layout(origin)
        return manifest

    def check_layout(self, origin: str) -> None:
        """Raise ShardError unless the shards cover the pool in order and without gap."""
        shard_tokens, first = self.member_tokens * self.members_per_shard, 0
        for shard in self.shards:
            full = shard is not self.shards[-1]
            if shard.first != first or (full and shard.tokens != shard_tokens):
                raise ShardError(f"{origin}: shard {shard.name} does not follow its predecessor")
            first += shard.tokens
        if first != self.tokens:
            raise ShardError(f"{origin}: shards hold {first:,} tokens, not {self.tokens:,}")

    @cached_property
    def sha256(self) -> str:
        """Identity of the data: hash of the canonical JSON."""
        return sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    @property
    def item_dtype(self) -> np.dtype[Any]:
        """numpy dtype of one stored token."""
        return np.dtype(self.dtype)

    @property
    def shard_tokens(self) -> int:
        """Tokens of a full shard."""
        return self.member_tokens * self.members_per_shard

    @property
    def bytes_per_token(self) -> float:
        """Average UTF-8 bytes of text that a token encodes."""
        return self.raw_bytes / self.tokens

    def to_json(self) -> str:
        """Content of the file: readable JSON with the identity inside."""
        return json.dumps(
            {"manifest_sha256": self.sha256, **self.model_dump(mode="json")}, indent=1
        )


def read_local(path: Path) -> str:
    """Read the text of a manifest on this machine; ShardError if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        out = path.parent.parent
        raise ShardError(
            f"no manifest at {path}; `epochal data prepare SOURCES --out {out}` writes one"
        ) from None
    except IsADirectoryError:
        raise ShardError(
            f"{path} is a folder; name a manifest, e.g. {path / 'train' / 'manifest.json'}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"cannot read the manifest {path}: {error}") from error


def canonical_json(value: Any) -> bytes:
    """Canonical spelling of a JSON value, for hashes: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
