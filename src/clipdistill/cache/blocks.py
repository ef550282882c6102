"""The store on disk: named blocks of rows in a folder with a manifest, written whole and read through memory maps.

    blocks = BlockFolder(folder, what="search index", remedy="delete it and run `clipdistill search` again")
    blocks.describe({"kind": "...", "format": 1, ...})            # manifest.json, replaced in one step
    blocks.write("part-000001", {"vectors": rows}, {"model": fingerprint})
    rows = blocks.read("part-000001", {"model": fingerprint}).arrays["vectors"]     # nothing is copied

A block is a safetensors file. Its metadata says what it belongs to (the caller's own fields), and holds a CRC-32 of all
tensor bytes (tensors in the order of their names) and one of the header: that finds truncation and bit flips, not an
attacker. A folder grows by further blocks; what the manifest does not name does not count. `write_table` keeps what
belongs to the rows (keys, paths, digests) in an Arrow file whose name carries its content's digest. The embedding
cache, region stores and search indexes are such folders.
"""

from __future__ import annotations

import itertools
import json
import mmap
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdistill.errors import InputError
from clipdistill.runtime.files import cannot_write, new_file, read_json, remove_leftovers, sha256, write_json

MANIFEST = "manifest.json"
CACHE_REMEDY = "delete the file and run `clipdistill cache` again to fill it"
_LARGEST_HEADER = 1 << 20  # bytes; ours take about one kilobyte
_TABLE_BATCH = 65_536
_FORMATS = {
    "F64": (torch.float64, np.float64), "F32": (torch.float32, np.float32), "F16": (torch.float16, np.float16),
    "BF16": (torch.bfloat16, np.uint16), "I64": (torch.int64, np.int64), "I32": (torch.int32, np.int32),
    "I8": (torch.int8, np.int8), "U8": (torch.uint8, np.uint8),
}  # fmt: skip
_NUMPY: dict[str, Any] = {name: numpy for name, (_, numpy) in _FORMATS.items()}
_STORED = {torch_dtype: name for name, (torch_dtype, _) in _FORMATS.items()}


class BlockFolder:
    """The blocks and the manifest of one folder. Picklable: another process maps the files anew.

    what: the kind of folder, for messages; remedy: what to do about a damaged block; manifest: its file's name. Blocks
    may lie in sub-folders: their names are paths without the ending. One process writes a block at a time.
    """

    def __init__(self, folder: Path, *, what: str, remedy: str, manifest: str = MANIFEST) -> None:
        self.folder, self.what, self.remedy = Path(folder), what, remedy
        self.manifest = self.folder / manifest
        self._open: dict[str, Block] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def description(self) -> dict[str, Any]:
        """What the manifest says. Raises InputError when it is missing or no JSON object, or was changed since."""
        values = read_json(self.manifest, self.remedy)
        checksum = values.pop("checksum", None)  # of version 0.2's indexes
        if checksum is not None and checksum != _json_checksum(values):
            raise InputError(f"{self.manifest}: damaged (its checksum does not match its content): {self.remedy}")
        return values

    def describe(self, values: Mapping[str, Any]) -> None:
        """Write the manifest, replacing the one before in one step. Raises InputError where nothing can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.manifest, values, checked=True)
        except OSError as error:
            raise cannot_write(self.folder, self.what, error) from error

    def path(self, name: str) -> Path:
        """The file of a block."""
        return self.folder / f"{name}.safetensors"

    def names(self, within: str = "") -> set[str]:
        """Names of the blocks that are there, in the folder itself or in a sub-folder."""
        prefix = f"{within}/" if within else ""
        found = (self.folder / within).glob("*.safetensors")
        return {prefix + path.stem for path in found if not path.name.startswith(".")}

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a block whole; see `write_block`. Raises InputError where nothing can be written."""
        self._open.pop(name, None)
        try:
            write_block(self.path(name), tensors, metadata)
        except OSError as error:
            raise cannot_write(self.folder, self.what, error) from error

    def open(self, name: str, metadata: Mapping[str, str] | None = None) -> Block:
        """A block. Raises InputError when it is missing or damaged, or its metadata are not those given."""
        block = Block(self.path(name), self.remedy)
        block.require(metadata or {}, self.what)
        return block

    def read(
        self, name: str, metadata: Mapping[str, str] | None = None, check: Callable[[Block], None] = lambda _: None
    ) -> Block:
        """`open`, once for each name. check: called with the block when it is opened."""
        if name not in self._open:
            block = self.open(name, metadata)
            check(block)
            self._open[name] = block
        return self._open[name]

    def remove(self, name: str) -> None:
        """Take away a block, and what a killed writer left of it."""
        self._open.pop(name, None)
        path = self.path(name)
        path.unlink(missing_ok=True)
        remove_leftovers(path.parent, path.name)


def write_block(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a block whole or not at all, synced before its name appears.

    Equal tensors and metadata give equal bytes (the safetensors library orders its header anew every time).
    """
    raw = {name: _raw(tensor) for name, tensor in sorted(tensors.items())}
    header: dict[str, Any] = {"__metadata__": {**metadata, "crc32": f"{_crc(raw.values()):08x}"}}
    position = 0
    # the widest numbers first, so that every tensor begins at a multiple of its own width
    names = sorted(raw, key=lambda name: -tensors[name].element_size())
    for name in names:
        shape, size = list(tensors[name].shape), raw[name].nbytes
        header[name] = {
            "dtype": _STORED[tensors[name].dtype],
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    header["__metadata__"]["header_crc32"] = _json_checksum(header)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(raw[name])


def _raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _crc(parts: Iterable[Any]) -> int:
    checksum = 0
    for content in parts:
        checksum = zlib.crc32(content, checksum)
    return checksum


def _json_checksum(values: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, read when they are touched. Raises OSError, and ValueError for an empty file."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def require_uncut(content: mmap.mmap, path: Path | str) -> None:
    """Raise InputError when a mapped file was cut since: to touch what lay behind its end would kill the process."""
    if (size := content.size()) < len(content):
        raise InputError(f"{path}: was cut while it was read (it has {size} of {len(content)} bytes): bring it back")


class Block:
    """A block's tensors as numpy arrays over a memory map (bf16 as uint16). Opening reads the header only."""

    def __init__(self, path: Path, remedy: str = CACHE_REMEDY) -> None:
        self.path, self.remedy = path, remedy
        try:
            self._map = map_file(path)
        except FileNotFoundError:
            raise InputError(f"{path}: the block is missing: {remedy}") from None
        except OSError as error:
            raise InputError(f"{path}: the block cannot be read ({error.strerror or error})") from error
        except ValueError:  # an empty file cannot be mapped
            raise self._damaged("it is empty") from None
        self._header, self._start = self._parse()
        self.metadata: dict[str, str] = self._header.pop("__metadata__", {})
        wanted = self.metadata.get("header_crc32")  # missing in blocks of earlier versions and of other programs
        plain = {name: text for name, text in self.metadata.items() if name != "header_crc32"}
        if wanted is not None and wanted != _json_checksum({**self._header, "__metadata__": plain}):
            raise self._damaged("its header's checksum does not match")

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self.path}: damaged block ({what}): {self.remedy}")

    def _parse(self) -> tuple[dict, int]:
        size = int.from_bytes(self._map[:8], "little")
        if len(self._map) < 8 or size > min(_LARGEST_HEADER, len(self._map) - 8):
            raise self._damaged("its header does not fit the file")
        try:
            header = json.loads(self._map[8 : 8 + size])
            metadata = header.get("__metadata__", {})
            if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("its metadata are no texts")
            end = 0
            for name, entry in sorted(
                ((n, e) for n, e in header.items() if n != "__metadata__"), key=lambda item: item[1]["data_offsets"]
            ):
                first, last = entry["data_offsets"]
                if not all(type(number) is int and number >= 0 for number in entry["shape"]):
                    raise ValueError(f"tensor '{name}' has the shape {entry['shape']}")
                expected = np.dtype(_NUMPY[entry["dtype"]]).itemsize * int(np.prod(entry["shape"], dtype=np.int64))
                if first != end or last - first != expected:
                    raise ValueError(f"tensor '{name}' does not fill its place")
                end = last
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise self._damaged(f"its header cannot be read: {error}") from error
        if 8 + size + end != len(self._map):
            raise self._damaged(f"it has {len(self._map)} bytes instead of {8 + size + end}")
        return header, 8 + size

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Every tensor by name, read-only, nothing copied: to be asked for anew at every use, as by `require_uncut`."""
        require_uncut(self._map, self.path)
        return self._arrays

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
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

    def require(self, metadata: Mapping[str, str], what: str) -> None:
        """Raises InputError that names the first field of the metadata which is not as given."""
        for field, expected in metadata.items():
            found = self.metadata.get(field)
            if found != expected:
                raise InputError(
                    f"{self.path}: {field}: the block was written with {found!r}, the manifest says {expected!r}: it "
                    f"belongs to another {what}"
                )

    def verify(self) -> None:
        """Read every byte and compare with the checksum (`crc32` of the metadata); raises InputError."""
        require_uncut(self._map, self.path)
        with memoryview(self._map) as view:
            places = (
                [self._start + offset for offset in self._header[n]["data_offsets"]] for n in sorted(self._header)
            )
            checksum = _crc(view[first:last] for first, last in places)
        if self.metadata.get("crc32") != f"{checksum:08x}":
            raise self._damaged("its checksum does not match its content")


def write_table(folder: Path, prefix: str, schema: Any, records: Iterable[Mapping[str, Any]]) -> str:
    """Write an Arrow file of `records` and return its name, PREFIX-DIGEST.arrow: a table is never changed in place."""
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    remaining = iter(records)
    with new_file(folder / f"{prefix}.arrow") as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            while batch := list(itertools.islice(remaining, _TABLE_BATCH)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        name = f"{prefix}-{sha256(temporary)[:16]}.arrow"
    (folder / f"{prefix}.arrow").replace(folder / name)
    return name


def read_table(path: Path, schema: Any, what: str, remedy: str) -> tuple[Any, mmap.mmap]:
    """The Arrow table in a file of `write_table` and the map that it lies in, for `require_uncut`.

    Raises InputError when it has another schema.
    """
    import pyarrow as pa

    try:
        content = map_file(path)
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        # offsets are trusted by everything that reads them: a damaged or hostile file could lead outside its memory
        table.validate(full=True)
    except FileNotFoundError:
        raise InputError(f"{path}: the {what} is missing: {remedy}") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path}: not readable as an Arrow file ({error}): {remedy}") from error
    if table.schema != schema:
        raise InputError(f"{path}: columns {table.schema.names} instead of {schema.names}: {remedy}")
    return table, content


def require_whole_table(path: Path) -> None:
    """Read every byte of a table and compare with the digest in its name; raises InputError."""
    if not path.name.endswith(f"-{sha256(path)[:16]}.arrow"):
        raise InputError(f"{path}: damaged: its content is not what its name says: {CACHE_REMEDY}")
