"""Pools of token shards: plain tar files, a manifest that names and hashes them, access by address.

files      files that appear whole or not at all, names that stay in their folder
fields     limits of what a manifest or mix may hold
manifest   the content of a pool, and the hash that is the identity of the data
shards     the format of one tar file, and its writer
web        http(s): redirects, credentials
speed      minimum speed of a transfer
remote     reading a URL, resumable
cache      remote files on a local disk, shared by processes
source     the files of a pool, from a folder or through the cache
pool       tokens at any address, from memory-mapped shards
verify     every byte of a pool against its manifest
"""
