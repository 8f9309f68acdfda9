"""The manifest of a pool: the content of its shards, and the hash that is the data's identity.

Nothing in it depends on the machine, the time or the number of processes that prepared it, so the
same text and settings give the same hash everywhere. One string then says which data a run used.
"""

from __future__ import annotations

import json
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from data_pipeline.errors import ShardError
from data_pipeline.regular import read_regular
from data_pipeline.shards.fields import (
    MANIFEST_BYTES,
    Count,
    FileName,
    Positive,
    Sha256,
    ShortXxh3,
    VocabSize,
    Xxh3,
    describe,
    load_json,
)

FORMAT: Final = "tokens-tar/1"
HEADER_BYTES: Final = 512
"""Header of a tar member, and the block to which members are padded."""
END_BYTES: Final = 1024
"""End of a tar file."""
LARGEST_MEMBER: Final = 256 << 20
"""Bytes of the largest member, which is hashed in memory; usual ones have 1 MiB."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerRecord(_Record):
    """The tokenizer that the ids belong to."""

    kind: Literal["sentencepiece", "huggingface"]
    sha256: Sha256
    """Hash of the file (transport)."""
    pieces_sha256: Sha256
    """Hash of pieces, scores and normaliser (identity)."""
    vocab_size: VocabSize
    pad_id: Count
    mask_id: Count
    doc_id: Count
    never_targets: tuple[Count, ...]
    """Ids that no target can take."""

    @model_validator(mode="after")
    def _ids_are_consistent(self) -> Self:
        special = {"pad_id": self.pad_id, "mask_id": self.mask_id, "doc_id": self.doc_id}
        named = [*special.items(), *(("never_targets", i) for i in self.never_targets)]
        for name, token_id in named:
            if token_id >= self.vocab_size:
                raise ValueError(f"{name} {token_id} is outside the {self.vocab_size} ids")
        silent = set(self.never_targets)
        if not {self.pad_id, self.mask_id} <= silent or self.doc_id in silent:
            raise ValueError("never_targets holds pad_id and mask_id, but not doc_id")
        return self


class PackingRecord(_Record):
    """The way documents became one array of tokens."""

    separator: Literal["after"] = "after"
    """Every document is followed by `doc_id`."""
    document_order: Literal["keyed-hash"] = "keyed-hash"
    seed: Count
    """Key of the document order."""
    unit: Literal["document"] = "document"
    """Documents are encoded whole, never split first: splitting changes unigram ids."""


class SourceRecord(_Record):
    """Share of one source in this split."""

    name: str
    license: str
    documents: Count
    raw_bytes: Count
    """UTF-8 bytes of the text."""
    tokens: Count
    """Tokens including one separator a document."""


class SplitRule(_Record):
    """Rule of the split: validation takes the documents whose content hash is below a threshold."""

    hash: Literal["blake2b-8(content key)"] = "blake2b-8(content key)"
    validation_below: Annotated[str, StringConstraints(pattern="^(0x)?[0-9a-f]{1,16}$")]
    """Threshold of the unsigned 64-bit hash, hexadecimal."""


class RoundTrip(_Record):
    """Result of decoding every document and comparing it with its text."""

    checked: Count
    failed: Count
    """Documents whose text differs after decode(encode(text))."""
    examples: tuple[str, ...] = ()
    """Ids of some documents that failed."""


class ShardRecord(_Record):
    """One tar file of members with `member_tokens` tokens each; the pool's last one is shorter."""

    name: FileName
    bytes: Positive
    tokens: Positive
    first: Count
    """Pool position of the first token."""
    sha256: Sha256
    xxh3: Xxh3
    """xxh3-128 of the file: the fast check at open."""
    member_xxh3: tuple[ShortXxh3, ...]
    """xxh3-64 of each member's payload: checks single members, lazily or over the network."""


class DocumentIndex(_Record):
    """The file `documents.bin`: pool positions of all separators, ascending, as `<u8`."""

    name: FileName = "documents.bin"
    count: Count
    sha256: Sha256


class Manifest(_Record):
    """Description of one pool (one split): all that a reader needs to know."""

    format: Literal["tokens-tar/1"] = FORMAT
    split: Literal["train", "validation"]
    dtype: Literal["<u2", "<u4"]
    tokens: Count
    """Tokens of the pool, separators included; all of them may be targets."""
    raw_bytes: Count
    """UTF-8 bytes of the text that the tokens encode (separators encode none)."""
    member_tokens: Positive
    members_per_shard: Positive
    tokenizer: TokenizerRecord
    packing: PackingRecord
    split_rule: SplitRule
    round_trip: RoundTrip
    sources: tuple[SourceRecord, ...]
    shards: tuple[ShardRecord, ...]
    documents: DocumentIndex

    @model_validator(mode="after")
    def _counts_are_consistent(self) -> Self:
        if self.dtype == "<u2" and self.tokenizer.vocab_size > 1 << 16:
            raise ValueError(f"dtype <u2 is too small for {self.tokenizer.vocab_size:,} ids")
        if self.member_tokens * self.item_dtype.itemsize % HEADER_BYTES:
            raise ValueError(f"a member of {self.member_tokens} tokens does not fill tar blocks")
        if self.member_tokens * self.item_dtype.itemsize > LARGEST_MEMBER:
            raise ValueError(f"a member has at most {LARGEST_MEMBER:,} bytes")
        _check_shards(self)
        names = [self.documents.name, *(shard.name for shard in self.shards)]
        if len({*names, "manifest.json"}) <= len(names):
            raise ValueError("its files do not all have different names")
        if self.sources and sum(source.tokens for source in self.sources) != self.tokens:
            raise ValueError(f"sources: their tokens do not add up to {self.tokens:,}")
        if self.tokens and not self.raw_bytes:
            raise ValueError(f"raw_bytes: 0 for {self.tokens:,} tokens")
        if self.documents.count > self.tokens:
            raise ValueError(f"documents: {self.documents.count:,} separators, too many")
        return self

    @staticmethod
    def load(path: Path) -> Manifest:
        """Read `path`; ShardError if it is missing, not a manifest or damaged."""
        return Manifest.parse(read_local(Path(path)), str(path))

    @staticmethod
    def parse(text: str, origin: str) -> Manifest:
        """Validate the JSON `text` read from `origin`; ShardError if it is no whole manifest."""
        try:
            content = load_json(text)
            if not isinstance(content, dict):
                raise ValueError("it is no JSON object")
            stored = content.pop("manifest_sha256", None)
            manifest = Manifest.model_validate(content)
        except ValidationError as error:
            raise ShardError(f"{origin} is not a {FORMAT} manifest:{describe(error)}") from None
        except ValueError as error:
            raise ShardError(f"{origin} is not a {FORMAT} manifest: {error}") from None
        if stored != manifest.sha256:
            raise ShardError(
                f"{origin} was changed after it was written: its content hashes to "
                f"{manifest.sha256}, it says {stored}; fetch it again or prepare the data again"
            )
        return manifest

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


def _check_shards(manifest: Manifest) -> None:
    """Raise ValueError unless the shards cover the pool in order, each with the bytes it needs."""
    full, first = manifest.shard_tokens, 0
    for number, shard in enumerate(manifest.shards):
        place = f"shards.{number}: {shard.name}"
        last = number == len(manifest.shards) - 1
        if shard.first != first or shard.tokens > full or (shard.tokens < full and not last):
            raise ValueError(f"{place} does not follow its predecessor")
        members, rest = divmod(shard.tokens, manifest.member_tokens)
        if len(shard.member_xxh3) != members + (rest > 0):
            raise ValueError(f"{place} has {len(shard.member_xxh3)} hashes of members")
        size = manifest.item_dtype.itemsize
        needed = members * (HEADER_BYTES + manifest.member_tokens * size) + END_BYTES
        if rest:
            needed += HEADER_BYTES + rest * size + -rest * size % HEADER_BYTES
        if shard.bytes != needed:
            raise ValueError(
                f"{place} has {shard.bytes:,} bytes, {needed:,} follow from its tokens"
            )
        first += shard.tokens
    if first != manifest.tokens:
        raise ValueError(f"shards hold {first:,} tokens, not {manifest.tokens:,}")


def read_local(path: Path) -> str:
    """Read the text of a manifest on this machine; ShardError if there is none."""
    try:
        return read_regular(path, MANIFEST_BYTES).decode("utf-8")
    except FileNotFoundError:
        out = path.parent.parent
        raise ShardError(
            f"no manifest at {path}; `epochal data prepare SOURCES --out {out}` writes one"
        ) from None
    except IsADirectoryError:
        raise ShardError(
            f"{path} is a folder; name a manifest, e.g. {path / 'train' / 'manifest.json'}"
        ) from None
    except UnicodeDecodeError as error:
        raise ShardError(f"cannot read the manifest {path}: {error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ShardError(f"cannot read the manifest {path}: {reason}") from error


def canonical_json(value: Any) -> bytes:
    """Canonical spelling of a JSON value, for hashes: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
