"""A model as a service: embeddings and zero-shot classification over HTTP, requests answered in common batches."""
