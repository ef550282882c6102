"""Ways to spoil a file: blind ones on bytes, and ones that keep enough of the form to get past the first check."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

Repair = Callable[[bytes], bytes]

_NUMBERS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40)
_LARGEST = 1 << 18  # bytes: larger inputs only make everything slow


def mangle(data: bytes, rng: random.Random, words: Sequence[bytes], others: Sequence[bytes]) -> bytes:
    """`data` after one to sixteen random changes; `words` are pieces the format knows, `others` files to join."""
    content = bytearray(data)
    for _ in range(1 << rng.randrange(5)):
        size = len(content)
        at = rng.randrange(size + 1)
        match rng.randrange(10):
            case 0 if size:
                content[at % size] ^= 1 << rng.randrange(8)
            case 1 if size:
                content[at % size] = rng.randrange(256)
            case 2:
                width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
                value = (rng.choice(_NUMBERS) + rng.randrange(-2, 3)) % (1 << (8 * width))
                content[at : at + width] = value.to_bytes(width, order)  # type: ignore[arg-type]
            case 3:
                del content[at : at + rng.choice((1, 2, 4, 16, 64, 512))]
            case 4 if size < _LARGEST:
                length = rng.choice((1, 2, 4, 16, 64, 512))
                start = rng.randrange(size + 1)
                content[at:at] = content[start : start + length]
            case 5:
                content[at : at + rng.choice((0, 1, 4))] = rng.randbytes(rng.choice((1, 2, 4, 16)))
            case 6 if words:
                word = rng.choice(words)
                content[at : at + rng.choice((0, len(word)))] = word
            case 7 if others:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                content[at:] = other[start : start + _LARGEST]
            case 8 if rng.random() < 0.3:
                del content[at:]
            case 9 if size:
                content[at : at + rng.choice((1, 8, 100))] = bytes([rng.choice((0, 32, 48, 255))]) * rng.choice((1, 8))
    return bytes(content[:_LARGEST])


def repair_png(data: bytes) -> bytes:
    """The checksums of a PNG's chunks made right, so that its readers look at what is inside."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    content, at = bytearray(data), 8
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        end = at + 8 + length
        if end + 4 > len(content):
            break
        struct.pack_into(">I", content, end, zlib.crc32(content[at + 4 : end]))
        at = end + 4
    return bytes(content)


def repair_tar(data: bytes) -> bytes:
    """The checksum of every block that looks like a tar header made right."""
    content = bytearray(data)
    for at in range(0, len(content) - 511, 512):
        if content[at + 257 : at + 262] == b"ustar" or (at == 0 and any(content[:512])):
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    return bytes(content)


_STRINGS = (
    "", " ", "\0", "nan", "None", "a.jpg", "b.png", "c.jpg", "./a.jpg", "../a.jpg", "/etc/passwd", "a.jpg/", "..", ".",
    "\ud800", "\udcff.jpg", "\ufffd", "\u202eflip", "\U0001f600", "e\u0301", "x" * 3000, "C:\\a.jpg", "train", "val",
    "0", "1", "-1", "9" * 30, "½", "٣", "images", "sentences", "raw", "filename", "split",
)  # fmt: skip


def scalar(rng: random.Random) -> Any:
    """Some value of JSON's kinds, most of them unwelcome."""
    return rng.choice(
        (
            None, True, False, 0, -1, 1, 2, 3, 10**20, 10**400, 0.5, float("nan"), float("inf"), -0.0, [], {},
            [None], {"raw": None}, {"": 0}, *(rng.choice(_STRINGS) for _ in range(12)),
        )
    )  # fmt: skip


def mangle_tree(tree: Any, rng: random.Random, depth: int = 0) -> Any:
    """A JSON value with a few parts replaced, removed, repeated or moved."""
    if rng.random() < 0.04 or depth > 8:
        return scalar(rng)
    if isinstance(tree, dict):
        changed = {k: mangle_tree(v, rng, depth + 1) for k, v in tree.items() if rng.random() > 0.03}
        if rng.random() < 0.1:
            changed[rng.choice(_STRINGS)] = scalar(rng)
        return changed
    if isinstance(tree, list):
        items = [mangle_tree(v, rng, depth + 1) for v in tree if rng.random() > 0.03]
        if items and rng.random() < 0.15:
            items.insert(rng.randrange(len(items) + 1), rng.choice(items))
        if rng.random() < 0.1:
            items.append(scalar(rng))
        if rng.random() < 0.05:
            rng.shuffle(items)
        return items
    if isinstance(tree, str) and rng.random() < 0.08:
        at = rng.randrange(len(tree) + 1)
        return tree[:at] + rng.choice(_STRINGS) + tree[at:]
    return tree


def mangle_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON document mangled as a tree; documents that are none are returned as they are."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return data
    text = json.dumps(mangle_tree(tree, rng), ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.02:
        deep = rng.choice((50, 5000))
        text = text.replace("0", "[" * deep + "]" * deep, 1)
    return text.encode("utf-8", "surrogatepass")
