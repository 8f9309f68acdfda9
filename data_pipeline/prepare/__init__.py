"""Preparation: raw text to a tokenizer and two pools, restartable at any moment.

    units --collect--> runs --tokenise--> token files --pack--> two pools, with their manifests

    collect    reads every unit once and writes runs, sorted by a keyed hash of each text
    tokenise   reads a bucket (the part of all runs in one range of keys), drops copies, splits by
               content and encodes
    pack       joins the tokens of all buckets and writes the shards, then the manifest
    prepare    leads through the stages; between the first two it looks for near-duplicates, if
               wanted, checks that both pools get documents (`check_split`), chooses the size of
               the vocabulary (`vocabulary`) and trains the tokenizer (`make_tokenizer`)

Buckets in sequence are the corpus in keyed order, whatever its size. A stage knows nothing but the
files of the stage before it, so a start after a kill redoes only what was unfinished.
"""
