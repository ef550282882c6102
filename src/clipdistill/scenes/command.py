"""`clipdistill scenes`: write the built-in image-caption set to disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipdistill.scenes.pairs import DEFAULT_PIXELS, DEFAULT_SIZES
from clipdistill.scenes.world import SPLITS
from clipdistill.scenes.write import FORMATS, write_scenes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to write, and where."""
    sizes = ", ".join(f"{split} {size}" for split, size in DEFAULT_SIZES.items())
    parser.add_argument("--out", type=Path, required=True, help="folder to write, made when absent")
    parser.add_argument("--format", default="webdataset", help=f"{' or '.join(FORMATS)} (default: webdataset)")
    parser.add_argument("--split", default="train", help=f"{', '.join(SPLITS)} (default: train)")
    parser.add_argument("--size", type=int, default=None, help=f"number of samples (default: {sizes})")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another set of pictures (default: 0)")
    parser.add_argument(
        "--pixels", type=int, default=DEFAULT_PIXELS, help=f"side of the pictures (default: {DEFAULT_PIXELS})"
    )
    parser.add_argument("--shard-size", type=int, default=1000, help="samples in one tar or folder (default: 1000)")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")


def run(arguments: argparse.Namespace) -> int:
    """Write them, with a progress bar, and say what to open."""
    names = ("out", "format", "split", "size", "seed", "pixels", "shard_size", "workers")
    written = write_scenes(**{name: getattr(arguments, name) for name in names}, bar=True)
    print(f"wrote {written}")
    return 0
