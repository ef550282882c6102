"""A contact sheet of scenes with their captions, to look at:  python -m clipdistill.scenes.sheet OUT.png"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clipdistill.scenes.pairs import open_scenes


def contact_sheet(split: str, first: int, count: int, seed: int = 0, pixels: int = 64, columns: int = 3) -> Image.Image:
    """Scenes `first`... of a split, enlarged, each with its five captions."""
    source = open_scenes(split, first + count, seed, pixels)
    font = ImageFont.load_default(size=13)
    side, text_width, height = 192, 430, 250
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (side + text_width + 20), rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for place in range(count):
        i = first + place
        left, top = place % columns * (side + text_width + 20) + 8, place // columns * height + 8
        sheet.paste(source.image(i).resize((side, side), Image.Resampling.NEAREST), (left, top))
        pen.text((left, top + side + 4), source.key(i), fill="gray", font=font)
        lines = [line for caption in source.captions(i) for line in [*textwrap.wrap(f"- {caption}", 62)]]
        pen.multiline_text((left + side + 8, top), "\n".join(lines), fill="black", font=font, spacing=3)
    return sheet


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one sheet."""
    parser = argparse.ArgumentParser(description="a contact sheet of built-in scenes with their captions")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pixels", type=int, default=64)
    options = parser.parse_args(arguments)
    contact_sheet(options.split, options.first, options.count, options.seed, options.pixels).save(options.out)


if __name__ == "__main__":
    main()
