"""Towers of any origin, joined into one CLIP: how such a model is named, what it is made of, how it is read."""
