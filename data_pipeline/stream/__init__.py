"""The stream of a run, from the manifest of a pool to the batches of one rank.

    Manifest                      content of a pool: shards, hashes, tokenizer
      TokenPool                   tokens at any address, from memory-mapped shards
        Budget                    the first U tokens of the pool, as n sequences of S tokens
          Order                   sequence at each place of each epoch: a keyed permutation
            TokenStream           rows and valid tokens at position g = epoch * n + place
              (MixtureStream)     source at position g, and the position within that source
                BudgetLoader      rows of one rank in each global batch, prefetched
                  GlobalBatch     micro-batches of one optimizer step

Each layer knows the layers above it in this list, and none below: only the loader knows ranks and
batch sizes, only the streams know epochs, only the pool knows files. Down to the streams there is
no state: the answer to a question depends on the question alone, and what is kept between two of
them (open shards, an epoch's layout) saves time only. The loader has one integer, the position at
which it starts. So the data state of a run is the position of its next sequence; `Cursor` is this
position with the fingerprint that gives it its meaning. To resume is to start a loader there, with
any number of ranks and any batch size.

Beside this chain:

    open_stream   location (manifest, mix file, URL) -> TokenStream or MixtureStream
    documents     document boundaries: segments of a sequence, an index for counting
    iterable      the same rows for a webdataset pipeline or another trainer
    inspection    one sequence or one step, for people
    visits        the proof after a run: visits of every sequence
"""
