"""Streams by location: a manifest gives a budget, a mix file a mixture of budgets.

A mix is a small JSON file that names manifests, their budgets and weights. It is a file of this
machine or a URL, like every manifest that it names; relative ones are beside it. `read_pools` reads
manifests only, so that a run can be checked before any shard is read.
"""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from data_pipeline.errors import BudgetError, DataError
from data_pipeline.json_keys import refuse_repeats
from data_pipeline.shards.cache import Cache
from data_pipeline.shards.fields import LARGEST, check_printable, describe, load_json
from data_pipeline.shards.manifest import Manifest, canonical_json
from data_pipeline.shards.pool import TokenPool, Verify
from data_pipeline.shards.remote import is_remote
from data_pipeline.shards.source import read_text
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.documents import DocumentMode
from data_pipeline.stream.mixture import MixtureMode, MixtureSource, MixtureStream
from data_pipeline.stream.order import window_size
from data_pipeline.stream.stream import TokenStream

Location = Path | str
"""A path of this machine, or a URL."""
Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class MixEntry(BaseModel):
    """One budget of a mix file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(check_printable)]
    manifest: Annotated[str, Field(min_length=1), AfterValidator(check_printable)]
    """Path relative to the mix file, absolute path or URL; a mix behind a URL names no path."""
    unique_tokens: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    """Budget of this source; null takes its whole pool."""
    weight: Share | None = None
    """Relative share of the positions (`weighted`, where it is required)."""
    max_epochs: Share | None = None
    """Upper limit of the source's epochs; a run that needs more is refused."""


class Mix(BaseModel):
    """Content of a mix file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["mixture/1"]
    mode: MixtureMode
    sources: Annotated[tuple[MixEntry, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [entry.name for entry in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"source names must differ: {names}")
        for entry in self.sources:
            if (entry.weight is None) == (self.mode == "weighted"):
                need = "needs a weight" if entry.weight is None else "takes no weight"
                raise ValueError(f"source {entry.name}: mode {self.mode} {need}")
        return self


@dataclass(frozen=True)
class NamedPool:
    """A pool behind a location, with the part of it that is used."""

    location: Location
    manifest: Manifest
    unique_tokens: int | None


def open_stream(
    location: Location,
    *,
    seed: int,
    seq_length: int,
    epochs: float,
    unique_tokens: int | None = None,
    order: str = "global",
    documents: DocumentMode = "packed",
    verify: Verify = "full",
    cache: Cache | None = None,
) -> TokenStream | MixtureStream:
    """Open the stream of a manifest or a mix; DataError for anything that does not fit.

    Every source of a mix has the same order, documents and check; `epochs` counts the sum of its
    budgets. URLs need a `cache`.
    """

    window = window_size(order)
    # With a bounded cache only the shards of one window stay pinned; its blocks straddle two each.
    bounded = cache is not None and cache.limit_bytes is not None
    open_shards = 2 * window if window is not None and bounded else None

    def stream(where: Location, tokens: int | None) -> TokenStream:
        pool = TokenPool(where, verify, tokens, cache=cache, open_shards=open_shards)
        budget = Budget(tokens, seq_length, pool.manifest.tokens)
        return TokenStream(pool, budget, seed=seed, order=order, documents=documents, epochs=epochs)

    content = read_content(location)
    if isinstance(content, Manifest):
        return stream(location, unique_tokens)
    check_mix(content, location, unique_tokens, order)
    _refuse_repeated_pool(_pools(content, location))
    sources = [
        MixtureSource(
            entry.name,
            stream(beside(location, entry.manifest), entry.unique_tokens),
            weight=entry.weight or 1.0,
            max_epochs=entry.max_epochs,
        )
        for entry in content.sources
    ]
    return MixtureStream(sources, content.mode, seed=seed, epochs=epochs)


def read_pools(
    location: Location, unique_tokens: int | None = None, order: str = "global"
) -> list[NamedPool]:
    """Read the manifests and budgets behind a location, no shard; DataError if they are wrong."""
    content = read_content(location)
    if isinstance(content, Manifest):
        return [NamedPool(location, content, unique_tokens)]
    check_mix(content, location, unique_tokens, order)
    pools = _pools(content, location)
    _refuse_repeated_pool(pools)
    return pools


def content_hash(location: Location) -> str:
    """Identity of the tokens behind a location, the same wherever the files are."""
    content = read_content(location)
    if isinstance(content, Manifest):
        return content.sha256
    parts = [
        [pool.manifest.sha256, pool.unique_tokens, entry.weight]
        for pool, entry in zip(_pools(content, location), content.sources, strict=True)
    ]
    return sha256(canonical_json([content.mode, parts])).hexdigest()


def read_content(location: Location) -> Manifest | Mix:
    """Read the manifest or mix at a location; ShardError or DataError if it is neither."""
    text = read_text(location)
    try:
        value = load_json(text.removeprefix("\ufeff"))
        kind = value.get("format", "") if isinstance(value, dict) else ""
    except ValueError:
        kind = ""
    if not str(kind).startswith("mixture/"):
        return Manifest.parse(text, str(location))
    try:
        json.loads(text.removeprefix("\ufeff"), object_pairs_hook=refuse_repeats)
    except ValueError as error:
        raise DataError(f"{location}: {error}; remove one of them") from None
    try:
        return Mix.model_validate(value)
    except ValidationError as error:
        raise DataError(f"{location} is not a mix of format mixture/1:{describe(error)}") from None


def beside(location: Location, manifest: str) -> Location:
    """Location of `manifest` for a mix at `location`.

    DataError where a mix behind a URL names a path of this machine.
    """
    if is_remote(manifest):
        return manifest
    if is_remote(location) and Path(manifest).is_absolute():
        raise DataError(
            f"{location} names {manifest}, a path of this machine; a mix behind a URL names URLs "
            "or manifests relative to itself"
        )
    if not is_remote(location):
        return Path(location).parent / manifest
    url = urlsplit(str(location))
    path = posixpath.normpath(posixpath.join(posixpath.dirname(url.path), manifest))
    return urlunsplit(url._replace(path=path))


def check_mix(mix: Mix, location: Location, unique_tokens: int | None, order: str) -> None:
    """Raise DataError for settings of a run that a mix does not have."""
    if unique_tokens is not None:
        raise BudgetError(
            f"{location} is a mix, whose sources have their own budgets: set data.unique_tokens to "
            f"null and give unique_tokens to its sources"
        )
    if mix.mode == "proportional" and order != "global":
        raise DataError(
            f"{location}: a proportional mix is one permutation of all budgets, so data.order is "
            f"global, not {order}; a weighted mix keeps the order of its sources"
        )


def _pools(mix: Mix, location: Location) -> list[NamedPool]:
    """Pools that a mix names; DataError if one of them is a mix."""
    pools = []
    for entry in mix.sources:
        where = beside(location, entry.manifest)
        found = read_content(where)
        if not isinstance(found, Manifest):
            raise DataError(
                f"{location}: source {entry.name} names another mix ({where}); name its manifests"
            )
        pools.append(NamedPool(where, found, entry.unique_tokens))
    return pools


def _refuse_repeated_pool(pools: list[NamedPool]) -> None:
    """Raise DataError for a pool that is named twice: its tokens would count as unique twice."""
    first: dict[str, Location] = {}
    for pool in pools:
        if pool.manifest.sha256 in first:
            raise DataError(
                f"two sources of a mix hold the same tokens, which would count as unique twice: "
                f"{first[pool.manifest.sha256]} and {pool.location}; name the pool once"
            )
        first[pool.manifest.sha256] = pool.location
