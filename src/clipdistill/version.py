"""The package's version; apart, so that whoever states it loads nothing else."""

__version__ = "0.1.0"
