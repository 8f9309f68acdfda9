"""Pools of token shards: format, manifest, verification, remote sources, cache."""
