"""Small good files of every kind that is read: what the fuzzer starts from."""

from __future__ import annotations

import functools
import io
import json
import random
import tarfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, features

GOOD = ("a.jpg", "b.png", "c.jpg")
"""Names of the good images that lie beside every spoiled file."""


def picture(seed: int, width: int = 20, height: int = 14) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def good_images() -> dict[str, bytes]:
    return {name: encoded(picture(k), "PNG" if name.endswith("png") else "JPEG") for k, name in enumerate(GOOD)}


def images() -> list[bytes]:
    """Every format and mode that is decoded."""
    base = picture(9)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [picture(k) for k in range(3)]
    grey16 = Image.fromarray(np.arange(280, dtype=np.uint16).reshape(14, 20) * 200)
    palette = base.convert("P", palette=Image.Palette.ADAPTIVE, colors=7)
    found = [
        encoded(base, "JPEG"),
        encoded(picture(8, 90, 70), "JPEG"),
        encoded(base, "JPEG", exif=exif),
        encoded(base, "JPEG", progressive=True, subsampling=0, comment=b"hello"),
        encoded(base.convert("CMYK"), "JPEG"),
        encoded(base.convert("L"), "JPEG"),
        *(encoded(base.convert(mode), "PNG") for mode in ("RGB", "L", "LA", "RGBA", "1")),
        encoded(palette, "PNG", transparency=1),
        encoded(palette, "PNG", bits=4),
        encoded(base, "PNG", exif=exif),
        encoded(grey16, "PNG"),
        encoded(base, "PNG", transparency=(1, 2, 3)),
        encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        encoded(base, "GIF"),
        encoded(palette, "GIF", transparency=0),
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=9),
        *(encoded(base.convert(mode), "BMP") for mode in ("RGB", "P", "1", "RGBA")),
        *(encoded(base.convert(mode), "TIFF") for mode in ("RGB", "L", "CMYK", "LAB", "F", "1", "RGBA", "I")),
        *(encoded(base, "TIFF", compression=kind) for kind in ("tiff_lzw", "packbits", "tiff_adobe_deflate")),
        encoded(grey16, "TIFF"),
        encoded(base, "TIFF", exif=exif),
        *(encoded(base.convert(mode), "PPM") for mode in ("RGB", "L", "1")),
        b"P3\n2 2\n255\n1 2 3 4 5 6 7 8 9 10 11 12\n",
        b"P2\n2 2\n65535\n1 2 3 65535\n",
        b"P5\n%d %d\n65535\n" % grey16.size + np.asarray(grey16).astype(">u2").tobytes(),
        encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]),
    ]
    if features.check("webp"):
        found.append(encoded(base, "WEBP", lossless=True, exif=exif))
        found.append(encoded(base.convert("RGBA"), "WEBP"))
        found.append(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    if features.check("avif"):
        found.append(encoded(base, "AVIF", speed=10))
        found.append(encoded(base.convert("RGBA"), "AVIF", speed=10))
    return found


def tar(members: list[tuple[str, bytes]], layout: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        end = archive.offset
    return buffer.getvalue()[: end + 1024]  # the end mark, not tarfile's whole record of zeros


def pair_members(prefix: str = "") -> list[tuple[str, bytes]]:
    image = encoded(picture(1, 6, 5), "PNG")
    return [
        (f"{prefix}x.jpg", image), (f"{prefix}x.txt", b"a red bird"),
        (f"{prefix}y.png", image), (f"{prefix}y.json", b'{"captions": ["one", "two"], "caption": "three"}'),
        (f"{prefix}z.webp", image), (f"{prefix}z.txt", "caf\u00e9".encode()), (f"{prefix}z.json", b'{"caption": 3}'),
    ]  # fmt: skip


def pair_tars() -> list[bytes]:
    long = "n" * 120 + "/"
    return [
        tar(pair_members()),
        tar(pair_members(long), tarfile.GNU_FORMAT),
        tar(pair_members("\u00e4" * 60 + "/"), tarfile.PAX_FORMAT),
        tar(pair_members() + pair_members()),
    ]


def random_tar(rng: random.Random) -> bytes:
    """An archive of members with odd names, kinds and sizes, correctly written."""
    names = (
        "x",
        "y",
        "../x",
        "/etc/x",
        "a/b/x",
        "x.y",
        ".x",
        "x#2",
        "",
        "\udcff",
        "\u202e",
        "n" * 101,
        "d/" * 60 + "x",
    )
    ends = (".jpg", ".JPG", ".png", ".txt", ".json", ".cls", ".b.jpg", ".", "")
    kinds = (b"0", b"0", b"0", b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"g", b"x", b"L", b"K", b"Z")
    contents = (b"", b"words", b"\xff\xfe", b"{}", b'{"captions": []}', b'{"captions": [null, 3, "c"]}', b"[" * 2000,
                b"7", b"9" * 30, b"-1", b"0 x", encoded(picture(1, 4, 4), "PNG"), bytes(513))  # fmt: skip
    buffer = io.BytesIO()
    layout = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as archive:
        for _ in range(rng.randrange(8)):
            content = rng.choice(contents)
            info = tarfile.TarInfo(rng.choice(names) + rng.choice(ends))
            info.size, info.linkname = len(content), rng.choice(("", "x.jpg", "/etc/passwd"))
            info.type = rng.choice(kinds)
            try:
                archive.addfile(info, io.BytesIO(content))
            except (ValueError, UnicodeError):
                continue  # a name that this layout cannot hold
    return buffer.getvalue()


def karpathy() -> bytes:
    rows = [
        {"filename": name, "filepath": "", "split": "train", "imgid": k,
         "sentences": [{"raw": f"caption {k}", "tokens": ["caption"], "sentid": k}, {"raw": "another", "sentid": 9}]}
        for k, name in enumerate(GOOD)
    ]  # fmt: skip
    return json.dumps({"images": rows, "dataset": "small"}).encode()


def coco() -> bytes:
    content = {
        "info": {},
        "images": [{"id": k, "file_name": name, "width": 20, "height": 14} for k, name in enumerate(GOOD)],
        "annotations": [{"id": 10 * k, "image_id": k % 3, "caption": f"caption {k}"} for k in range(5)],
    }
    return json.dumps(content).encode()


def tables() -> list[bytes]:
    rows = [
        ["filepath", "title"],
        ["a.jpg", "one"],
        ["b.png", "two, three"],
        ["a.jpg", 'four "quoted"'],
        ["c.jpg", "é"],
    ]

    def joined(separator: str, quote: bool) -> str:
        def cell(text: str) -> str:
            return '"' + text.replace('"', '""') + '"' if quote else text.replace(separator, " ")

        return "".join(separator.join(cell(text) for text in row) + "\n" for row in rows)

    return [
        joined(",", True).encode(),
        joined("\t", False).encode(),
        joined(";", True).encode("utf-16"),
        b"\xef\xbb\xbf" + joined("|", True).replace("\n", "\r\n").encode(),
        b"split,filepath,title\ntrain,a.jpg,one\nval,b.png,two\n",
    ]


def parquets() -> list[bytes]:
    inside = [{"bytes": data, "path": name} for name, data in good_images().items()]
    return [
        parquet({"filepath": list(GOOD), "title": ["one", "two", "three"]}),
        parquet({"image": inside, "caption": [["one", "two"], ["three"], ["four"]]}, row_group_size=1),
        parquet({"jpg": [cell["bytes"] for cell in inside], "txt": ["a", "b", None]}, compression="none"),
        parquet({"filepath": list(GOOD), "title": ["x"] * 3, "split": ["train", "val", "train"]}, compression="gzip"),
    ]


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def random_parquet(rng: random.Random) -> bytes:
    """A valid table whose columns have the right names and any types."""
    cells: tuple[Any, ...] = (
        ["a.jpg", "b.png", None], [b"\xff", b"", None], [1, 2, None], [1.5, float("nan"), 0.0], [True, False, None],
        [None, None, None], [["a.jpg"], [], None], [[None], ["x", None], ["y"]], [{"bytes": b"x"}, None, None],
        [{"bytes": None}, None, {"bytes": b"y"}],
        [{"path": "a.jpg"}, {"path": None}, None], [{"bytes": "text"}, None, None], ["", " ", "nan"],
        pa.array([1, None, 3], pa.date32()), [[["deep"]], [[None]], None], ["x" * 3000, "\u202e", "\0"],
        pa.array([b"\xff\xfe", b"ok", None], pa.binary()).view(pa.string()),
        pa.array(["a.jpg", "b.png", "a.jpg"]).dictionary_encode(), pa.array(["a.jpg", None, ""], pa.large_string()),
        pa.array([b"x", b"y", b"z"], pa.binary(1)), pa.array([b"x", None, b"z"], pa.large_binary()),
        pa.array([1, 2, 3], pa.decimal128(5)), pa.array([[b"x"], [None], None], pa.list_(pa.binary())),
        pa.array([[("k", "v")], None, []], pa.map_(pa.string(), pa.string())),
        [{"bytes": data, "path": None} for data in good_images().values()],
    )  # fmt: skip
    names = ("filepath", "title", "image", "caption", "split", "image", "filepath", "bytes", "jpg", "txt", "captions")
    columns = {rng.choice(names): rng.choice(cells) for _ in range(rng.randrange(1, 5))}
    rows = rng.choice((0, 1, 3, 3, 3))
    table = pa.table({k: v if isinstance(v, pa.Array) else pa.array(v) for k, v in columns.items()}).slice(0, rows)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rng.choice((1, 2, 1000)))
    return buffer.getvalue()


def labelled_tar() -> bytes:
    image = encoded(picture(1, 6, 5), "PNG")
    members = [(f"{k}.{end}", content) for k in range(3) for end, content in (("png", image), ("cls", b"%d" % (k % 2)))]
    return tar(members)


def npz(**changes: Any) -> bytes:
    arrays: dict[str, Any] = {
        "images": np.stack([np.asarray(picture(k, 5, 4)) for k in range(3)]),
        "labels": np.array([0, 1, 1]),
        "classnames": np.array(["cat", "dog"]),
        "filenames": np.array(["a", "b", "c"]),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    return buffer.getvalue()


def random_npz(rng: random.Random) -> bytes:
    values: tuple[Any, ...] = (
        None, np.array(3), np.array([]), np.zeros((3, 4, 5, 3), np.float32), np.zeros((0, 4, 5, 3), np.uint8),
        np.zeros((3, 0, 5, 3), np.uint8), np.array([0, 1, -1]), np.array([0, 1, 2**63], np.uint64),
        np.array(["a", "a", "b"]), np.array([b"a", b"\xff", b""]), np.array([0.0, 1.0, np.nan]), np.array(["cat", ""]),
        np.array([True, False, True]), np.array(["2020", "2021", "NaT"], "datetime64[Y]"), np.array([[0], [1], [1]]),
        np.array([(1, 2.0)], "i4,f4"),
    )  # fmt: skip
    names = ("images", "labels", "classnames", "filenames", "extra")
    return npz(**{rng.choice(names): rng.choice(values) for _ in range(rng.randrange(1, 3))})


def class_files() -> list[bytes]:
    contents: tuple[Any, ...] = (
        ["cat", "dog"],
        {"cat": 0, "dog": 1},
        {"0": "cat", "1": "dog"},
        {"n01440764": "tench", "n01443537": "goldfish"},
        [{"index": 0, "name": "cat", "wnid": "n01440764"}, {"index": 1, "name": "dog", "wnid": "n01443537"}],
    )
    return [json.dumps(content).encode() for content in contents]
