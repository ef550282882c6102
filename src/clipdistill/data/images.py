"""Encoded bytes to an RGB picture, or BadSample with the reason; nothing in between.

Defined results: EXIF orientation is applied; CMYK and other colour spaces are converted to RGB; 16-bit grey keeps its
high byte (as Pillow does with 16-bit RGB); transparency is laid on white; of animations the first frame is taken.
The header is read first: a picture with more than `max_pixels` is refused before anything is decompressed.
Not detectable: bytes changed inside a JPEG's compressed data so that it still decodes to its full size.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from clipdistill.data.problems import BadSample
from clipdistill.errors import first_line

MAX_PIXELS = 64_000_000
"""Above Pillow's own limit (179 million) a larger `max_pixels` has no effect."""
MOST_PIECES = 50_000
"""Segments, chunks or blocks of a file; photographs have some dozens."""
MOST_PROFILES = 4
MOST_PLAIN_PIXELS = 4_000_000
"""Of pictures whose pixels are written as text, which are read slowly."""
MOST_SCANS = 100
MOST_SCANNED_PIXELS = 1_000_000_000
"""Scans times pixels of a JPEG, some seconds of decoding: 15 scans of the largest picture that is allowed."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "AVIF")
"""Not all of Pillow's more than forty: EPS runs Ghostscript."""

# damage is reported through BadSample, once per sample, not as thousands of warnings from Pillow's readers
warnings.filterwarnings("ignore", module=r"PIL\.")

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, max_pixels: int = MAX_PIXELS, at_least: int | None = None) -> Image.Image:
    """The RGB picture in `data`. Raises BadSample (empty, not an image, too many pixels, truncated, corrupt).

    at_least: a JPEG with both sides at least twice as long may be decoded at 1/2, 1/4 or 1/8 of its size, as long as
    both sides keep this many pixels: several times faster, but other pixels than a full decode and a resize. The full
    size (oriented width, height) is then in `info["source_size"]`, and `info["source_box"]` says which (left, top,
    right, bottom) of the reduced picture the full one covers (its last pixels may be only partly covered).
    """
    if not data:
        raise BadSample("empty image file")
    # whatever the process has set: Pillow would otherwise fill the missing part of a truncated picture with grey
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with _damage_told():
        picture = _open(data, max_pixels)
        full_size = picture.size
        drafted = None
        if at_least is not None and picture.format == "JPEG":
            drafted = picture.draft(None, (at_least, at_least))
        picture.load()
        _refuse_zero_filled(picture.format, data)
        orientation = _orientation(picture)
        info: dict[str, tuple[float, ...]] = {}
        if drafted is not None and picture.size != full_size:
            _, _, width, height = drafted[1]
            info["source_size"] = full_size[::-1] if orientation >= 5 else full_size
            info["source_box"] = _oriented_box(width, height, picture.size, orientation)
        rgb = _upright(picture, orientation)
    rgb.info.clear()  # profiles, comments and EXIF go no further
    rgb.info.update(info)  # type: ignore[arg-type]
    return rgb


def as_rgb(picture: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture of a user's program as `decode` would give it; the picture itself is left alone. Raises BadSample."""
    with _damage_told():
        _check_size(*picture.size, max_pixels)
        rgb = _upright(picture.copy(), _orientation(picture, keep=True))
    rgb.info.clear()
    return rgb


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    rgb = _to_rgb(picture)
    return rgb.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else rgb


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    """Within, whatever Pillow's readers raise on damaged input (almost any type) becomes a BadSample."""
    try:
        yield
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(f"too many pixels: {first_line(error, 120)}") from error
    except Exception as error:
        truncated = "truncat" in str(error).lower() or isinstance(error, EOFError)
        raise BadSample(f"{'truncated' if truncated else 'corrupt'} image: {first_line(error, 120)}") from error


def _oriented_box(
    width: float, height: float, size: tuple[int, int], orientation: int
) -> tuple[float, float, float, float]:
    """Where the region (0, 0, width, height) of a picture of `size` lies after its EXIF orientation was applied."""
    left = size[0] - width if orientation in (2, 3, 7, 8) else 0.0
    top = size[1] - height if orientation in (3, 4, 6, 7) else 0.0
    box = (left, top, left + width, top + height)
    return (box[1], box[0], box[3], box[2]) if orientation >= 5 else box


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The picture with only its header read, of at most `max_pixels` pixels."""
    _check_pieces(data)
    try:
        picture = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError as error:
        start = data[:64].lstrip().lower()
        kind = (
            "it is a web page" if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")) else "unknown format"
        )
        raise BadSample(f"not an image: {kind}, {len(data)} bytes") from error
    _check_size(*picture.size, max_pixels)
    if picture.format == "PPM" and data[:2] in (b"P1", b"P2", b"P3"):
        _check_size(*picture.size, MOST_PLAIN_PIXELS)
    _check_scans(picture, data)
    return picture


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadSample(f"corrupt image: its size is {width} x {height}")
    if width * height > max_pixels:
        raise BadSample(f"too many pixels: {width} x {height}, at most {max_pixels} are allowed")


def _check_pieces(data: bytes) -> None:
    """Refuse a file in so many pieces, or with so many compressed profiles, that reading its header takes long."""
    pieces = profiles = 0
    if data.startswith(b"\xff\xd8"):
        position = 2
        while pieces <= MOST_PIECES and data[position : position + 1] == b"\xff" and position + 1 < len(data):
            marker, pieces = data[position + 1], pieces + 1
            if marker in (0xDA, 0xD9):
                break
            if marker in (0x00, 0xFF):
                position += 1
            else:
                position += (
                    2 if 0xD0 <= marker <= 0xD8 else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
                )
    elif data.startswith(b"\x89PNG"):
        position = 8
        while pieces <= MOST_PIECES and position + 8 <= len(data):
            pieces += 1
            profiles += data[position + 4 : position + 8] == b"iCCP"
            position += 12 + int.from_bytes(data[position : position + 4], "big")
    elif data.startswith(b"GIF8"):
        pieces = data.count(b"\x21\xfe") + data.count(b"\x21\xff") + data.count(b"\x21\xf9")
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        pieces = _tiff_numbers(data)
    if pieces > MOST_PIECES or profiles > MOST_PROFILES:
        raise BadSample(f"too many pieces: {pieces} in {len(data)} bytes, {profiles} of them colour profiles")


def _tiff_numbers(data: bytes) -> int:
    """The most numbers that an entry of a TIFF's first directory holds (bytes and text apart): one a strip or tile."""
    order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"
    large = b"+" in data[:4]
    start, head, entry, width = (8, 8, 20, 8) if large else (4, 2, 12, 4)
    at = int.from_bytes(data[start : start + width], order)
    most = 0
    for number in range(min(int.from_bytes(data[at : at + head], order), MOST_PIECES)):
        place = at + head + number * entry
        if int.from_bytes(data[place + 2 : place + 4], order) not in (1, 2, 6, 7):
            most = max(most, int.from_bytes(data[place + 4 : place + 4 + width], order))
    return most


def _check_scans(picture: Image.Image, data: bytes) -> None:
    """Refuse a JPEG (also one inside a TIFF) of so many scans that it decodes for minutes.

    Every scan passes over the whole picture, however few bytes it has; usual progressive files have about ten.
    """
    if picture.format not in ("JPEG", "MPO", "TIFF"):
        return
    budget = max(1, min(MOST_SCANS, MOST_SCANNED_PIXELS // (picture.width * picture.height)))
    scans = data.count(b"\xff\xda")  # at most that many: previews and the bytes of other parts count as well
    if scans <= budget:
        return
    if picture.format == "TIFF":
        pieces = getattr(picture, "tag_v2", {}).get(273) or getattr(picture, "tag_v2", {}).get(324) or (0,)
        scans = scans // len(pieces) if getattr(picture, "info", {}).get("compression") in ("jpeg", "tiff_jpeg") else 0
    else:
        scans = _scans(data)
    if scans > budget:
        raise BadSample(f"too many scans: {scans} in {picture.width} x {picture.height}, at most {budget} are decoded")


_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # stuffed bytes and restart marks belong to a scan


def _scans(data: bytes) -> int:
    """The scans of the first picture of a JPEG file: its segments are passed over by their lengths."""
    scans, position = 0, 2
    while (found := _MARKER.search(data, position)) is not None:
        marker, position = data[found.start() + 1], found.end()
        if marker == 0xD9:
            break
        scans += marker == 0xDA
        if marker not in (0x01, 0xD8):
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return scans


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _refuse_zero_filled(format_name: str | None, data: bytes) -> None:
    """A JPEG cut short and filled up with zeros (a crashed copy) decodes to its full size, the rest grey."""
    if (
        format_name in ("JPEG", "MPO")
        and data.endswith(bytes(16))
        and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    ):
        raise BadSample("truncated image: the file ends in zeros")


def _orientation(picture: Image.Image, keep: bool = False) -> int:
    """The EXIF orientation 1 to 8; 1 when there is none or the EXIF data is damaged (the pixels are still good).

    keep: leave it on the picture, which is then asked again.
    """
    try:
        if "exif" not in picture.info and picture.format in ("JPEG", "MPO"):
            return 1  # spares the search through other metadata for nearly every photograph
        found = picture.getexif()
        orientation = int(found.get(0x0112, 1))
        if not keep:
            found.clear()  # the picture keeps it beside `info`
        return orientation
    except Exception:
        return 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    """The RGB of a loaded picture of any mode, transparency on white."""
    mode = picture.mode
    if mode.startswith("I;16") or mode == "I":
        # "I" is how 16-bit PGM (and, in older versions of Pillow, PNG) arrives
        high_byte = np.clip(np.asarray(picture).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if mode == "F":
        values = np.nan_to_num(np.asarray(picture), nan=0.0, posinf=255.0, neginf=0.0)
        scale = 255.0 if values.size and values.max() <= 1 else 1.0
        return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)).convert("RGB")
    if mode in ("La", "LA", "PA", "RGBa", "RGBA") or "transparency" in picture.info:
        if mode == "La":
            picture = picture.convert("LA")
        layer = picture.convert("RGBA")
        paper = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, layer).convert("RGB")
    return picture if mode == "RGB" else picture.convert("RGB")
