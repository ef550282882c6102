"""The teacher's embeddings of the whole training set, from a cache: terms that compare with them, cleaned targets."""
