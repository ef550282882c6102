"""Decoding: field.md E2 rows 1, 2, 9 and 10."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from clipdistill.data.images import decode
from clipdistill.data.problems import BadSample, reason_class
from tests.data.helpers import encoded, picture


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(BadSample) as caught:
        decode(data, **options)
    return caught.value.reason


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty image file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not an image: it is a web page, 44 bytes"),
        (b"  <html>gone</html>", "not an image: it is a web page, 19 bytes"),
        (b"\x00" * 100, "not an image: unknown format, 100 bytes"),
        (b"GIF89a", "not an image: unknown format, 6 bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image: unknown format, 49 bytes"),
    ],
)
def test_row_1_what_is_no_image(data: bytes, expected: str) -> None:
    assert reason(data) == expected


@pytest.mark.parametrize("kind", ["JPEG", "PROGRESSIVE", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_row_2_a_cut_file_is_never_half_used(kind: str) -> None:
    data = (
        encoded(picture(1, 200, 150), "JPEG", progressive=True)
        if kind == "PROGRESSIVE"
        else encoded(picture(1, 200, 150), kind)
    )
    whole = pixels(decode(data))
    for tenth in range(10):
        with pytest.raises(BadSample):
            decode(data[: len(data) * tenth // 10])
    for missing in range(1, 40):  # the last bytes may hold no pixels: either refused or the same picture
        with contextlib.suppress(BadSample):
            assert np.array_equal(pixels(decode(data[:-missing])), whole)


def test_row_2_holds_whatever_the_process_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(1, 200, 150))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert reason_class(reason(data[: len(data) // 2])) == "truncated image"


def test_row_2_a_jpeg_filled_up_with_zeros() -> None:
    data = encoded(picture(1, 200, 150))
    assert reason_class(reason(data[: len(data) // 2] + bytes(len(data)))) == "truncated image"
    decode(data + bytes(64))  # padding after a whole picture does no harm


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_row_9_bombs_are_refused_from_their_header() -> None:
    assert reason(bomb(9000, 9000)) == "too many pixels: 9000 x 9000, at most 64000000 are allowed"
    assert reason_class(reason(bomb(50_000, 50_000))) == "too many pixels"
    assert reason(encoded(picture(0, 40, 30)), max_pixels=1199) == "too many pixels: 40 x 30, at most 1199 are allowed"
    assert decode(encoded(picture(0, 40, 30)), max_pixels=1200).size == (40, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what importing the module sets
        assert reason_class(reason(bomb(10_000, 10_000), max_pixels=10**9)) == "truncated image"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_row_10_exif_orientation(orientation: int, kind: str) -> None:
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("red", (0, 0, 16, 8))  # the upper left quarter is red
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # PIL's numbers of the transpositions that orientations 2 to 8 undo
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encoded(stored, kind, exif=exif))
    assert decoded.size == (32, 16)
    assert np.abs(pixels(decoded).astype(int) - pixels(upright)).mean() < 12


def test_row_10_modes_have_a_defined_result() -> None:
    grey16 = Image.fromarray(np.array([[0, 255, 256, 65535]], dtype=np.uint16))
    assert pixels(decode(encoded(grey16, "PNG")))[0, :, 0].tolist() == [0, 0, 1, 255]
    assert pixels(decode(encoded(grey16, "TIFF")))[0, :, 0].tolist() == [0, 0, 1, 255]

    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (pixels(decode(encoded(clear, "PNG"))) == 255).all()
    half = Image.new("LA", (4, 4), (0, 128))
    assert pixels(decode(encoded(half, "PNG")))[0, 0].tolist() == [127, 127, 127]

    palette = picture(3).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    assert np.array_equal(pixels(decode(encoded(palette, "PNG"))), pixels(palette.convert("RGB")))
    see_through = Image.new("P", (4, 4), 0)
    see_through.putpalette([255, 0, 0, 0, 255, 0])
    assert (pixels(decode(encoded(see_through, "PNG", transparency=0))) == 255).all()
    keyed = Image.new("RGB", (4, 4), (10, 20, 30))
    assert (pixels(decode(encoded(keyed, "PNG", transparency=(10, 20, 30)))) == 255).all()

    assert pixels(decode(encoded(Image.new("1", (4, 4), 1), "PNG")))[0, 0].tolist() == [255, 255, 255]
    assert pixels(decode(encoded(Image.new("L", (4, 4), 77), "PNG")))[0, 0].tolist() == [77, 77, 77]
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert np.abs(pixels(decode(encoded(cyan, "JPEG", quality=100)))[0, 0].astype(int) - [0, 255, 255]).max() < 4
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert pixels(decode(encoded(unit, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


def test_row_10_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
        assert pixels(decode(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 2)])
def test_row_10_thin_pictures(size: tuple[int, int]) -> None:
    assert decode(encoded(picture(0, *size), "PNG")).size == size


def test_damaged_exif_costs_only_the_orientation() -> None:
    data = encoded(picture(2), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff\xff")
    assert np.array_equal(pixels(decode(data)), pixels(decode(encoded(picture(2)))))


def test_reduced_decoding_is_asked_for_and_keeps_the_size_in_mind() -> None:
    data = encoded(picture(4, 400, 300))
    assert decode(data).size == (400, 300)
    assert "source_size" not in decode(data).info
    reduced = decode(data, at_least=75)
    assert reduced.size == (100, 75)
    assert reduced.info["source_size"] == (400, 300)
    assert decode(data, at_least=160).size == (400, 300)
    assert decode(encoded(picture(4, 400, 300), "PNG"), at_least=75).size == (400, 300)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_decoding_says_where_the_source_lies(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # 397 x 301 pixels become 50 x 38, of which 49.625 x 37.625 are covered
    data = encoded(picture(4, 397, 301), exif=exif)
    full, reduced = decode(data), decode(data, at_least=37)
    assert reduced.info["source_size"] == full.size
    left, top, right, bottom = reduced.info["source_box"]
    assert (right - left, bottom - top) == (full.width / 8, full.height / 8)
    same = full.resize((40, 40), Image.Resampling.BICUBIC)
    found = reduced.resize((40, 40), Image.Resampling.BICUBIC, reduced.info["source_box"])
    assert np.abs(pixels(same).astype(int) - pixels(found)).mean() < 1.5


GOOD = [encoded(picture(5, 48, 36), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(GOOD), st.data())
def test_mangled_bytes_give_a_picture_or_a_bad_sample(good: bytes, data: st.DataObject) -> None:
    mangled = bytearray(good)
    for _ in range(data.draw(st.integers(1, 8))):
        position = data.draw(st.integers(0, len(mangled) - 1))
        action = data.draw(st.sampled_from(["set", "cut", "insert", "drop"]))
        if action == "set":
            mangled[position] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del mangled[max(position, 1) :]
        elif action == "insert":
            mangled[position:position] = data.draw(st.binary(max_size=20))
        elif len(mangled) > 1:
            del mangled[position]
    try:
        image = decode(bytes(mangled), max_pixels=10**6)
    except BadSample as error:
        assert error.reason  # noqa: PT017 - either outcome is right
        assert "\n" not in error.reason  # noqa: PT017
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= 10**6
        assert pixels(image).shape == (image.height, image.width, 3)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_no_image(data: bytes) -> None:
    with pytest.raises(BadSample):
        decode(data)


def test_good_pictures_equal_pillows_own_decoding() -> None:
    for data in GOOD:
        assert np.array_equal(pixels(decode(data)), pixels(Image.open(io.BytesIO(data)).convert("RGB")))
