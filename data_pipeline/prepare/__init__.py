"""From text to shards: collect, tokenise, pack."""
