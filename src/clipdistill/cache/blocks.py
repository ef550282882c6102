"""One block of the store: a safetensors file that is written whole or not at all, and read through a memory map.

Its metadata says which samples, which teacher and which fingerprint it belongs to, and holds a CRC-32 of all tensor
bytes (tensors in the order of their names): that finds truncation and bit flips, not an attacker.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdistill.errors import InputError

_LARGEST_HEADER = 1 << 20  # bytes; ours take about one kilobyte
_NUMPY = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I8": np.int8, "U8": np.uint8,
}  # fmt: skip
_STORED = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


def write_block(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a block under a temporary name, flush it to the disk, and rename it into place.

    Equal tensors and metadata give equal bytes (the safetensors library orders its header anew every time).
    """
    raw = {name: _raw(tensor) for name, tensor in sorted(tensors.items())}
    checksum = 0
    for content in raw.values():
        checksum = zlib.crc32(content, checksum)
    header: dict[str, Any] = {"__metadata__": {**metadata, "crc32": f"{checksum:08x}"}}
    position = 0
    # the widest numbers first, so that every tensor begins at a multiple of its own width
    names = sorted(raw, key=lambda name: -tensors[name].element_size())
    for name in names:
        shape, size = list(tensors[name].shape), raw[name].nbytes
        dtype = _STORED[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(raw[name])
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush(path.parent)


def _raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def remove_leftovers(path: Path) -> None:
    """Delete what killed writers of the block `path` left behind; call it only while holding the block's claim."""
    for leftover in path.parent.glob(f".{path.name}.*.writing"):
        leftover.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # a folder cannot be opened on some systems; the rename still orders the writes there
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Block:
    """A block's tensors as numpy arrays over a memory map (bf16 as uint16). Opening reads the header only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise InputError(f"{path}: the block is missing: run `clipdistill cache` again to fill it") from None
        except ValueError:  # an empty file cannot be mapped
            raise self._damaged("it is empty") from None
        self._header, self._start = self._parse()
        self.metadata: dict[str, str] = self._header.pop("__metadata__", {})

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"{self.path}: damaged block ({what}): delete the file and run `clipdistill cache` again to fill it"
        )

    def _parse(self) -> tuple[dict, int]:
        size = int.from_bytes(self._map[:8], "little")
        if len(self._map) < 8 or size > min(_LARGEST_HEADER, len(self._map) - 8):
            raise self._damaged("its header does not fit the file")
        try:
            header = json.loads(self._map[8 : 8 + size])
            end = 0
            for name, entry in sorted(
                ((n, e) for n, e in header.items() if n != "__metadata__"), key=lambda item: item[1]["data_offsets"]
            ):
                first, last = entry["data_offsets"]
                expected = np.dtype(_NUMPY[entry["dtype"]]).itemsize * int(np.prod(entry["shape"], dtype=np.int64))
                if first != end or last - first != expected:
                    raise ValueError(f"tensor '{name}' does not fill its place")
                end = last
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"its header cannot be read: {error}") from error
        if 8 + size + end != len(self._map):
            raise self._damaged(f"it has {len(self._map)} bytes instead of {8 + size + end}")
        return header, 8 + size

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Every tensor by name, read-only, nothing copied."""
        found = {}
        for name, entry in self._header.items():
            first, last = (self._start + offset for offset in entry["data_offsets"])
            dtype = np.dtype(_NUMPY[entry["dtype"]]).newbyteorder("<")
            flat = np.frombuffer(self._map, dtype, count=(last - first) // dtype.itemsize, offset=first)
            found[name] = flat.reshape(entry["shape"])
        return found

    def dtype(self, name: str) -> str:
        """The number format of a tensor as the file states it (`F16`, `BF16`, `I8`, ...), '' when it is not there."""
        return str(self._header[name]["dtype"]) if name in self._header else ""

    def verify(self) -> None:
        """Read every byte and compare with the checksum; raises InputError."""
        checksum = 0
        for name in sorted(self._header):
            first, last = (self._start + offset for offset in self._header[name]["data_offsets"])
            with memoryview(self._map) as view:
                checksum = zlib.crc32(view[first:last], checksum)
        if self.metadata.get("crc32") != f"{checksum:08x}":
            raise self._damaged("its checksum does not match its content")
