"""Teacher embeddings on disk: computed once, fingerprinted, read by any number of runs (docs/cache.md)."""
