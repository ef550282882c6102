"""Small files that are made to decode for minutes: each is refused at once, with its reason; usual ones are not."""

from __future__ import annotations

import io
import struct
import time
import zlib
from typing import Any

import pytest
from PIL import Image

from clipdistill.data.images import MAX_PIXELS, MOST_SCANNED_PIXELS, MOST_SCANS, decode
from clipdistill.data.loader import PairLoader
from clipdistill.data.problems import BadSample
from tests.data.helpers import FakeModel, MemoryPairs, encoded, picture

EMPTY_SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x10"  # refines one component, by nothing


def with_scans(side: int, count: int, **options: Any) -> bytes:
    data = encoded(picture(1, side, side), "JPEG", progressive=True, **options)
    end = data.rindex(b"\xff\xd9")
    return data[:end] + EMPTY_SCAN * count + b"\xff\xd9"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(pieces: bytes) -> bytes:
    data = encoded(1, "PNG")
    return data[:33] + pieces + data[33:]


def tiff_with_scans(count: int) -> bytes:
    """A TIFF whose one strip is a JPEG."""
    strip = with_scans(256, count)
    entries = [(256, 4, 1, 256), (257, 4, 1, 256), (258, 3, 1, 8), (259, 3, 1, 7), (262, 3, 1, 6), (273, 4, 1, 8),
               (277, 3, 1, 3), (278, 4, 1, 256), (279, 4, 1, len(strip))]  # fmt: skip
    strip += bytes(len(strip) % 2)
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory


def with_start(inserted: bytes, data: bytes) -> bytes:
    """A JPEG with something behind its first marker."""
    return data[:2] + inserted + data[2:]


SLOW = {
    "scans": (lambda: with_scans(1000, 2500), "too many scans: "),
    "few scans of a large picture": (lambda: with_scans(7900, 30), "too many scans: "),
    "scans in a tiff": (lambda: tiff_with_scans(3000), "too many scans|corrupt image"),
    "scans behind a preview": (
        lambda: with_start(
            b"\xff\xe1" + struct.pack(">H", 2 + 512) + EMPTY_SCAN * 51 + b"\0\0", with_scans(500, 400)
        ),
        "too many scans: ",
    ),
    "segments": (lambda: with_start(b"\xff\xfe\x00\x02" * 2_000_000, encoded(1)), "too many pieces"),
    "filling": (lambda: with_start(b"\xff" * 9_000_000, encoded(1)), "too many pieces"),
    "profiles": (
        lambda: png_with(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(900_000), 9)) * 3000), "3000 of them colour"
    ),
    "chunks": (lambda: png_with(chunk(b"tEXt", b"k\0") * 300_000), "too many pieces"),
    "one compressed text": (
        lambda: png_with(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(60_000_000), 9))), "too large"
    ),
    "compressed texts": (
        lambda: png_with(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000), 9)) * 3000), "too much"
    ),
    "blocks of a gif": (
        lambda: b"GIF89a\x09\0\x09\0\0\0\0" + b"\x21\xfe\x01a\0" * 1_000_000 + b"\x3b", "too many pieces"
    ),
    "pixels written as text": (lambda: b"P3 8000 8000 255\n" + b"1 2 3\n" * 10, "too many pixels"),
}  # fmt: skip
"""What is made, when it is asked for, and the reason it is refused with."""


@pytest.mark.parametrize("name", list(SLOW))
def test_a_file_made_to_decode_slowly_is_refused_at_once(name: str) -> None:
    make, reason = SLOW[name]
    data = make()
    begun = time.process_time()
    with pytest.raises(BadSample, match=f"(?i){reason}"):
        decode(data)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_many_frames_only_the_first_is_decoded(kind: str) -> None:
    frames = [picture(i, 64, 64) for i in range(300)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    begun = time.process_time()
    assert decode(buffer.getvalue()).size == (64, 64)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize("extra", [0, 1, 10, MOST_SCANS - 10])
def test_usual_numbers_of_scans_are_decoded(extra: int) -> None:
    assert decode(with_scans(300, extra)).size == (300, 300)


def test_the_largest_progressive_picture_that_is_allowed_is_decoded() -> None:
    side = int(MAX_PIXELS**0.5)
    assert MOST_SCANNED_PIXELS // side**2 >= 12
    assert decode(encoded(Image.new("RGB", (side // 4, side // 4)), "JPEG", progressive=True)).width == side // 4


def test_markers_inside_other_segments_are_no_scans() -> None:
    data = encoded(2)
    comment = EMPTY_SCAN * 500
    assert decode(data[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment + data[2:]).size == (40, 30)


def test_slow_pictures_are_listed_and_skipped_by_the_loader() -> None:
    source = MemoryPairs(6)
    source._images[2] = with_scans(1000, 2500)
    (batch,) = PairLoader(source, batch_size=6, student=FakeModel(), steps=1)
    assert len(batch.keys) == 5
    ((key, reason),) = batch.problems
    assert (key, reason.partition(":")[0]) == ("sample-0002", "too many scans")
