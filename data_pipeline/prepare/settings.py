"""Settings of a preparation: text, tokenizer, split and shards.

Everything here except `out` and `workers` decides the bytes that come out, so its hash is stored
with the result: running the same preparation again does nothing, and a changed one is refused.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_pipeline.corpus.source import SourceSettings
from data_pipeline.shards.manifest import LARGEST_MEMBER, canonical_json
from data_pipeline.shards.shards import MEMBER_BYTES
from data_pipeline.tokenizer.training import COVERAGE, ModelType

LOWEST_COVERAGE = 0.98
"""Least share of characters that SentencePiece takes as pieces."""
EARLIER_VOCABULARY = 32000
"""Default of `vocab_size` in versions that did not look at the size of the text."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerSettings(_Section):
    """An existing tokenizer, or the recipe for one trained on the training documents."""

    path: Path | None = None
    """Existing tokenizer file; null trains a SentencePiece model."""
    model_type: ModelType = "unigram"
    """Unigram encodes four times faster and a little shorter; BPE trains ten times faster."""
    vocab_size: Annotated[int, Field(ge=300)] | None = None
    """Ids of a trained tokenizer; null chooses by the size of the text (prepare/vocabulary.py)."""
    character_coverage: Annotated[float, Field(ge=LOWEST_COVERAGE, le=1)] = COVERAGE
    """Share of the text's characters that become pieces, at least 0.98; rarer ones are written
    as bytes."""
    train_bytes: Annotated[int, Field(ge=1)] = 100_000_000
    """UTF-8 bytes of training documents, in keyed order, that the trainer sees."""
    num_threads: Annotated[int, Field(ge=1)] = 2
    """Threads of the trainer; part of the recipe, because unigram pieces depend on it."""


class PrepareSettings(_Section):
    """A whole preparation."""

    out: Path
    """Folder that receives tokenizer, pools and report."""
    sources: Annotated[tuple[SourceSettings, ...], Field(min_length=1)] = (
        SourceSettings(path="builtin", license="PSF-2.0"),
    )
    tokenizer: TokenizerSettings = TokenizerSettings()
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of documents, chosen by content alone, that go to the validation pool."""
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = None
    """Drop documents whose word 5-grams resemble an earlier one's from this Jaccard similarity on
    (0.8 is usual), and training documents that so resemble validation ones; null does not look."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 17
    """Key of the document order in the pools."""
    skip_bad: Annotated[int, Field(ge=0)] = 0
    """Malformed records to skip and report; one more stops the preparation."""
    member_bytes: Annotated[int, Field(ge=512, le=LARGEST_MEMBER)] = MEMBER_BYTES
    """Payload of one tar member; a multiple of 512."""
    members_per_shard: Annotated[int, Field(ge=1)] | None = None
    """Members of a shard; null takes 32 (32 MiB), or 128 from 200 million tokens on."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Processes; null takes one per core. Does not change the output."""

    @field_validator("sources", mode="before")
    @classmethod
    def _path_or_mapping(cls, value: Any) -> Any:
        """Sources given as words, `sources: [books, more.jsonl]`, are paths."""
        if not isinstance(value, list | tuple):
            return value
        return [{"path": entry} if isinstance(entry, str) else entry for entry in value]

    @field_validator("member_bytes")
    @classmethod
    def _multiple_of_block(cls, value: int) -> int:
        if value % 512:
            raise ValueError("must be a multiple of 512, the block of a tar file")
        return value

    def content(self) -> dict[str, Any]:
        """Settings that decide the output: all but `out` and `workers`.

        Settings that earlier versions did not know are left out where they have their defaults, so
        that the hash of the others stays.
        """
        content = self.model_dump(mode="json", exclude={"out", "workers"})
        for source in content["sources"]:
            _drop_defaults(source, SourceSettings, ("split", "max_document_bytes"))
        tokenizer = content["tokenizer"]
        _drop_defaults(tokenizer, TokenizerSettings, ("character_coverage",))
        if tokenizer["path"] is not None and tokenizer["vocab_size"] is None:
            tokenizer["vocab_size"] = EARLIER_VOCABULARY
        return content

    def sha256(self) -> str:
        """Hash of the settings that decide the output."""
        return sha256(canonical_json(self.content())).hexdigest()

    def earlier_sha256(self) -> str:
        """Hash that an earlier version gave these settings: its vocabulary had a default size."""
        content = self.content()
        if content["tokenizer"]["vocab_size"] is None:
            content["tokenizer"]["vocab_size"] = EARLIER_VOCABULARY
        return sha256(canonical_json(content)).hexdigest()


def _drop_defaults(values: dict[str, Any], model: type[BaseModel], names: tuple[str, ...]) -> None:
    """Remove the values of `names` that are the defaults of `model`."""
    for name in names:
        if values[name] == model.model_fields[name].default:
            del values[name]
