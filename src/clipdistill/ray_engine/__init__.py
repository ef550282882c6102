"""Encoding on many machines: batches of `cache`, `embed` and `eval` go through Ray Data (`--engine ray`)."""
