"""Ablations: variants of a recipe times seeds under one budget, and what the results say."""
