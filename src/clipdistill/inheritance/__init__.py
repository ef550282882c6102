"""Automatic weight inheritance (TinyCLIP): train masks over a model's parts, then remove what they close."""
