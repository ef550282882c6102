"""Every kind of image file has a defined result: field.md E2 rows 9 and 10 (with tests/data/test_images.py)."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from clipdistill.data.images import decode
from clipdistill.data.problems import BadSample, reason_class
from clipdistill.data.views import EVALUATION_VIEW, ImageSpec, ViewPolicy, render_pixels, sample_view
from tests.data.helpers import encoded

HEIGHT, WIDTH = 4, 6
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
RGB = np.stack([40 * X, 60 * Y, 10 * (X + Y)], axis=-1).astype(np.uint8)
GREY = (10 * X + 50 * Y).astype(np.uint8)
ALPHA = (255 - 50 * X).astype(np.uint8)
GREY3 = np.repeat(GREY[..., None], 3, axis=-1)
ON_WHITE = np.rint(RGB * (ALPHA / 255.0)[..., None] + 255 * (1 - ALPHA / 255.0)[..., None])
GREY_ON_WHITE = np.rint(GREY3 * (ALPHA / 255.0)[..., None] + 255 * (1 - ALPHA / 255.0)[..., None])
CHECKS = ((X + Y) % 2 * 255).astype(np.uint8)
CHECKS3 = np.repeat(CHECKS[..., None], 3, axis=-1)


def chunk(name: bytes, content: bytes) -> bytes:
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(samples: np.ndarray, kind: int, *extra: bytes) -> bytes:
    """A PNG written by hand, with the bit depth of the array's type (8 or 16); Pillow does not write them all."""
    height, width = samples.shape[:2]
    rows = samples.astype(f">u{samples.itemsize}").reshape(height, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 8 * samples.itemsize, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def wide(values: np.ndarray) -> np.ndarray:
    """16-bit samples whose high byte is `values` and whose low byte differs."""
    return values.astype(np.uint16) * 256 + 77


def saved(array: np.ndarray, kind: str, mode: str | None = None, **options: Any) -> bytes:
    image = Image.fromarray(array)
    return encoded(image.convert(mode) if mode else image, kind, **options)


def bmp(rows: np.ndarray, top_down: bool) -> bytes:
    """An uncompressed 24-bit bitmap; a negative height says that the first row is the top one."""
    height, width = rows.shape[:2]
    order = rows if top_down else rows[::-1]
    lines = [row[:, ::-1].tobytes() + b"\0" * (-3 * width % 4) for row in order]
    body = b"".join(lines)
    header = struct.pack("<IiiHHIIiiII", 40, width, -height if top_down else height, 1, 24, 0, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54) + header + body


PALETTE = [value for k in range(256) for value in (k, 255 - k, k // 2)]


def paletted() -> Image.Image:
    image = Image.fromarray(GREY, "L").convert("L")
    result = Image.frombytes("P", image.size, image.tobytes())
    result.putpalette(PALETTE)
    return result


PALETTED = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)
KEYED = np.where((GREY == 10)[..., None], 255, PALETTED)
CMYK = np.concatenate([255 - RGB, np.zeros((HEIGHT, WIDTH, 1), np.uint8)], axis=-1)
BIG_ENDIAN_TIFF = saved(wide(GREY), "TIFF")

LOSSLESS: dict[str, tuple[bytes, np.ndarray]] = {
    "PNG 1": (saved(CHECKS, "PNG", "1"), CHECKS3),
    "PNG L": (saved(GREY, "PNG"), GREY3),
    "PNG LA": (png(np.stack([GREY, ALPHA], -1), 4), GREY_ON_WHITE),
    "PNG RGB": (saved(RGB, "PNG"), RGB),
    "PNG RGBA": (png(np.concatenate([RGB, ALPHA[..., None]], -1), 6), ON_WHITE),
    "PNG P": (encoded(paletted(), "PNG"), PALETTED),
    "PNG P with a transparent colour": (encoded(paletted(), "PNG", transparency=10), KEYED),
    "PNG P with alpha values": (encoded(paletted(), "PNG", transparency=bytes([255] * 10 + [0] + [255] * 245)), KEYED),
    "PNG RGB with a transparent colour": (png(RGB, 2, chunk(b"tRNS", struct.pack(">3H", 0, 0, 0))),
                                          np.where((RGB == 0).all(-1)[..., None], 255, RGB)),
    "PNG grey 16": (png(wide(GREY), 0), GREY3),
    "PNG RGB 16": (png(wide(RGB), 2), RGB),
    "PNG grey and alpha 16": (png(wide(np.stack([GREY, ALPHA], -1)), 4), GREY_ON_WHITE),
    "PNG RGBA 16": (png(wide(np.concatenate([RGB, ALPHA[..., None]], -1)), 6), ON_WHITE),
    "PNG animated": (encoded(Image.fromarray(RGB), "PNG", save_all=True,
                             append_images=[Image.fromarray(255 - RGB)], duration=9), RGB),
    "GIF": (encoded(paletted(), "GIF"), PALETTED),
    "GIF with a transparent colour": (encoded(paletted(), "GIF", transparency=10), KEYED),
    "GIF animated": (encoded(paletted(), "GIF", save_all=True, append_images=[paletted().rotate(180)], duration=9),
                     PALETTED),
    "BMP bottom first": (bmp(RGB, top_down=False), RGB),
    "BMP top first": (bmp(RGB, top_down=True), RGB),
    "BMP P": (encoded(paletted(), "BMP"), PALETTED),
    "BMP 1": (saved(CHECKS, "BMP", "1"), CHECKS3),
    "TIFF L": (saved(GREY, "TIFF"), GREY3),
    "TIFF RGB": (saved(RGB, "TIFF"), RGB),
    "TIFF RGB, LZW": (saved(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "TIFF 16": (BIG_ENDIAN_TIFF, GREY3),
    "TIFF 32": (encoded(Image.fromarray(wide(GREY).astype(np.int32)), "TIFF"), GREY3),
    "TIFF float 0 to 1": (saved((GREY / 255.0).astype(np.float32), "TIFF"), GREY3),
    "TIFF float 0 to 255": (saved(GREY.astype(np.float32) + 0.25, "TIFF"), GREY3),
    "TIFF CMYK": (encoded(Image.frombytes("CMYK", (WIDTH, HEIGHT), CMYK.tobytes()), "TIFF"), RGB),
    "TIFF of two pages": (encoded(Image.fromarray(RGB), "TIFF", save_all=True,
                                  append_images=[Image.fromarray(255 - RGB)]), RGB),
    "PBM text": (b"P1\n6 4\n" + b" ".join(b"%d" % (v == 0) for v in CHECKS.ravel()), CHECKS3),
    "PGM": (b"P5 6 4 255\n" + GREY.tobytes(), GREY3),
    "PGM 16": (b"P5 6 4 65535\n" + wide(GREY).astype(">u2").tobytes(), GREY3),
    "PGM text": (b"P2\n# a comment\n6 4\n255\n" + b" ".join(b"%d" % v for v in GREY.ravel()), GREY3),
    "PPM": (b"P6 6 4 255\n" + RGB.tobytes(), RGB),
    "PPM 16": (b"P6 6 4 65535\n" + wide(RGB).astype(">u2").tobytes(), RGB),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSLESS)
def test_row_10_modes_to_the_value(name: str) -> None:
    data, expected = LOSSLESS[name]
    found = decode(data)
    assert found.mode == "RGB"
    assert not found.info
    # one part in 255 where transparency is rounded; exact elsewhere
    tolerance = 1 if ("alpha" in name or name.endswith(("LA", "RGBA", "16")) or "CMYK" in name) else 0
    assert np.abs(np.asarray(found).astype(int) - expected.astype(int)).max() <= tolerance


BLOCK = np.full((32, 32), 1, np.uint8)
LOSSY: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "JPEG L": (saved(BLOCK * 90, "JPEG"), (90, 90, 90)),
    "JPEG CMYK": (encoded(Image.new("CMYK", (32, 32), (55, 155, 205, 0)), "JPEG", quality=95), (200, 100, 50)),
    "JPEG RGB, progressive": (encoded(Image.new("RGB", (32, 32), (200, 100, 50)), "JPEG", progressive=True),
                              (200, 100, 50)),
    "TIFF LAB": (encoded(Image.new("LAB", (32, 32), (128, 128, 128)), "TIFF"), (118, 118, 118)),
    "TIFF YCbCr": (encoded(Image.new("YCbCr", (32, 32), (90, 128, 128)), "TIFF"), (90, 90, 90)),
    "MPO": (encoded(Image.new("RGB", (32, 32), (200, 100, 50)), "MPO", save_all=True,
                    append_images=[Image.new("RGB", (32, 32), "white")]), (200, 100, 50)),
}  # fmt: skip
if features.check("webp"):
    LOSSY["WEBP with alpha"] = (encoded(Image.new("RGBA", (32, 32), (200, 0, 0, 128)), "WEBP"), (227, 127, 127))
if features.check("avif"):
    LOSSY["AVIF"] = (encoded(Image.new("RGB", (32, 32), (200, 100, 50)), "AVIF"), (200, 100, 50))
    LOSSY["AVIF with alpha"] = (encoded(Image.new("RGBA", (32, 32), (200, 0, 0, 128)), "AVIF"), (227, 127, 127))


def pillow_reads(data: bytes) -> bool:
    """Whether this version of Pillow can (before 13, not all the TIFFs that it writes)."""
    try:
        Image.open(io.BytesIO(data)).load()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("name", LOSSY)
def test_row_10_modes_of_lossy_files(name: str) -> None:
    data, expected = LOSSY[name]
    if name == "TIFF YCbCr" and not pillow_reads(data):
        with pytest.raises(BadSample, match="truncated"):
            decode(data)
        return
    found = np.asarray(decode(data)).reshape(-1, 3).astype(int)
    assert np.abs(found - expected).max() <= 4
    assert np.ptp(found, axis=0).max() <= 2


def tiff_header(width: int, height: int) -> bytes:
    """A TIFF directory without any pixels behind it."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
            (278, 4, height), (279, 4, min(width * height, 2**32 - 1))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0"


def gif_header(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0;"


def jpeg_header(width: int, height: int) -> bytes:
    """A real JPEG whose frame header claims another size."""
    data = bytearray(encoded())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = {
    "PNG": png(np.zeros((1, 1), np.uint8), 0).replace(
        chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
        chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)),
    ),
    "PNG, largest": png(np.zeros((1, 1), np.uint8), 0).replace(
        chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
        chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 0, 0, 0, 0)),
    ),
    "JPEG": jpeg_header(65_500, 65_500),
    "GIF": gif_header(65_535, 65_535),
    "TIFF": tiff_header(50_000, 50_000),
    "TIFF, largest": tiff_header(2**32 - 1, 2**32 - 1),
    "PPM": b"P6 50000 50000 255\n" + bytes(100),
    "BMP": b"BM"
    + struct.pack("<IHHI", 54, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 50_000, -50_000, 1, 24, *[0] * 6),
}


@pytest.mark.parametrize("name", BOMBS)
def test_row_9_bombs_are_refused_by_their_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # nothing is decompressed, nothing of that size is allocated
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for limit in (64_000_000, 10**15):
        with pytest.raises(BadSample) as caught:
            decode(BOMBS[name], max_pixels=limit)
        assert reason_class(caught.value.reason) == "too many pixels", caught.value.reason
        if limit > 10**9:
            assert "exceeds limit" in caught.value.reason or str(limit) in caught.value.reason
            break


def test_row_9_compressed_text_and_profiles_are_not_unfolded_without_end() -> None:
    zeros = zlib.compress(bytes(200 << 20), 9)
    for extra in (chunk(b"zTXt", b"k\0\0" + zeros), chunk(b"iCCP", b"k\0\0" + zeros)):
        data = png(RGB, 2, extra)
        assert len(data) < 1 << 20
        try:
            assert np.array_equal(np.asarray(decode(data)), RGB)
        except BadSample as error:
            assert reason_class(error.reason) == "corrupt image"  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (2, 9_999), (1, 3), (50_000, 2)])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_row_10_thin_pictures_are_rendered(size: tuple[int, int], resize_mode: Any) -> None:
    column = np.linspace(0, 255, max(size)).astype(np.uint8)
    strip = np.repeat(np.repeat(column[:, None, None], min(size), axis=1), 3, axis=2)
    strip = strip if size[1] >= size[0] else strip.transpose(1, 0, 2)
    image = decode(encoded(Image.fromarray(np.ascontiguousarray(strip)), "PNG"))
    assert image.size == size
    spec = ImageSpec(size=24, resize_mode=resize_mode)
    crop = sample_view(ViewPolicy(kind="crop"), *size, np.random.default_rng(0))
    for view in (EVALUATION_VIEW, crop):
        exact = render_pixels(image, view, spec, exact=True).astype(int)
        fast = render_pixels(image, view, spec, exact=False).astype(int)
        assert exact.shape == fast.shape == (24, 24, 3)
        assert np.abs(exact - fast).mean() < 3


def test_a_decoded_picture_carries_nothing_along() -> None:
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    image = Image.fromarray(RGB)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif, icc_profile=b"x" * 200, pnginfo=None)
    found = decode(buffer.getvalue())
    assert not found.info
    assert not dict(found.getexif())
    again = io.BytesIO()
    found.save(again, "PNG")
    assert b"where I live" not in again.getvalue()
