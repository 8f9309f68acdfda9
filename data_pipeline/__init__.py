"""Data of a run: from text files to exactly U unique tokens, E times, in a keyed order.

    corpus     text files        -> documents
    tokenizer  documents         -> token ids
    prepare    corpus, tokenizer -> tokenizer file and pools of shards        (offline, once)
    shards     pool              -> tokens at any address, checked, local or remote
    stream     pool, budget      -> batches at any position of the run, the same for every rank

`prepare` imports `corpus`, `tokenizer` and `shards`; `stream` imports `shards`, and `tokenizer`
where it shows text. A tokenizer knows its record in a manifest, and nothing else points back. The
package imports nothing else of the project, and no torch.
"""
