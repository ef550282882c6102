"""Pictures and captions to embeddings: the one encoder and the workers that prepare for it."""
