"""Parts of a running training: session, hooks, prefetched batches, compilation."""
