"""The published terms, one file each, found by `clipdistill.registry.TERMS`.

A term's facts are the fields of its TERM; docs/methods.md takes them from there. Files are light: torch is imported by
the functions that compute.
"""
