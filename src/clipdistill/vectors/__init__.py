"""Embeddings of pictures and texts in files that other programs read."""
