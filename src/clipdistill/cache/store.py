"""The store on disk: where its blocks lie, which are missing, and random access to what they hold.

    DIR/manifest.json                            what it holds and what it was made from
    DIR/samples-HASH.arrow                       the table of samples
    DIR/views/000000.safetensors                 stored views, when there are any
    DIR/teacher-0/000000.safetensors             image and text embeddings of one block
    DIR/teacher-0/synthetic-000000.safetensors   embeddings of its added captions, when there are any
    DIR/teacher-0/tokenizer.json                 the teacher's tokenizer

docs/cache.md describes each file so that others can write them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clipdistill.cache.blocks import Block, require_whole_table
from clipdistill.cache.manifest import FORMAT, blocks_of, read_manifest
from clipdistill.cache.rows import groups, unpack
from clipdistill.cache.samples import SampleTable
from clipdistill.cache.stored import DescribedEmbeddings
from clipdistill.cache.stored_views import read_view
from clipdistill.config import as_dict
from clipdistill.data.views import EVALUATION_VIEW, View
from clipdistill.embed.prepare import sample_digest
from clipdistill.errors import InputError

Part = Literal["pairs", "synthetic", "views"]
STORED_NAME = {"fp16": "F16", "bf16": "BF16", "int8": "I8"}
_NUMPY: dict[str, np.dtype[Any]] = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
}


def digest_of(values: Any) -> str:
    """A short digest of plain data."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class CacheStore(DescribedEmbeddings):
    """A store, read through memory maps. Picklable: another process opens the files anew."""

    def __init__(self, folder: Path, *, whole_table: bool = True) -> None:
        """whole_table: compare the table of samples with the digest in its name before anything trusts it."""
        self.folder = Path(folder)
        super().__init__(read_manifest(self.folder))
        table = self.folder / self.manifest.samples
        if whole_table and table.exists():
            require_whole_table(table)
        self.samples = SampleTable(table)
        if len(self.samples) != self.manifest.data.samples:
            raise InputError(
                f"{self.samples.path}: {len(self.samples)} samples, the manifest says {self.manifest.data.samples}"
            )
        self.layout = self.manifest.layout
        self._blocks: dict[tuple[Part, int, int], Block] = {}
        self._files = blocks_of(self.folder)
        _allow_open_files(len(self.layout) * len(self.parts()))

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheStore, (self.folder,)

    def __len__(self) -> int:
        return len(self.samples)

    def synthetic(self, index: int) -> tuple[str, ...]:
        return self.samples.synthetic(index)

    # --- files -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _name(part: Part, teacher: int, block: int) -> str:
        if part == "views":
            return f"views/{block:06d}"
        return f"teacher-{teacher}/{'synthetic-' if part == 'synthetic' else ''}{block:06d}"

    def path(self, part: Part, teacher: int, block: int) -> Path:
        """The file of one block; `teacher` does not matter for views."""
        return self._files.path(self._name(part, teacher, block))

    def parts(self) -> list[tuple[Part, int]]:
        """What each block consists of, in the order of writing."""
        found: list[tuple[Part, int]] = [("views", 0)] if self.manifest.views else []
        for teacher in range(len(self.manifest.teachers)):
            found.append(("pairs", teacher))
            if self.manifest.synthetic is not None:
                found.append(("synthetic", teacher))
        return found

    def missing(self, block: int) -> list[tuple[Part, int]]:
        """The parts of a block that are not filled."""
        return [part for part in self.parts() if not self.path(*part, block).exists()]

    def missing_blocks(self) -> list[int]:
        """Numbers of the blocks of which some part is not filled."""
        present: set[str] = set()
        for part, teacher in self.parts():
            present |= self._files.names(self._name(part, teacher, 0).partition("/")[0])
        return [
            block
            for block in range(len(self.layout))
            if any(self._name(*part, block) not in present for part in self.parts())
        ]

    def require_complete(self) -> None:
        """Raises InputError when a block is missing."""
        missing = self.missing_blocks()
        if missing:
            raise InputError(
                f"cache {self.folder}: {len(missing)} of {len(self.layout)} blocks are not filled (the first is "
                f"{missing[0]}): run the same `clipdistill cache` command again to fill them"
            )

    def blocks(self) -> Iterator[tuple[Part, int, int]]:
        """(part, teacher, number) of every block."""
        return ((*part, block) for part in self.parts() for block in range(len(self.layout)))

    def require_fields(self) -> int:
        """Compare every block's header with the manifest; returns the bytes of all. InputError names the field."""
        return sum(self._open(*place).path.stat().st_size for place in self.blocks())

    def verify_blocks(self) -> None:
        """Read every byte of every block; raises InputError for one that is not what was written."""
        for place in self.blocks():
            self._open(*place).verify()

    def contents(self) -> list[Any]:
        """Size and metadata of every block that is filled: its checksum is in them."""
        there = [self._open(*place) for place in self.blocks() if self.path(*place).exists()]
        return [[block.path.stat().st_size, block.metadata] for block in there]

    # --- what a block must say ---------------------------------------------------------------------------------------

    def keys_digest(self, block: int) -> str:
        """Digest of the keys and captions of a block's samples."""
        start, stop = self.layout.bounds(block)
        chosen = self.samples.digests[self.samples.in_row_order[start:stop]]
        return hashlib.sha256(np.ascontiguousarray(chosen).tobytes()).hexdigest()[:16]

    def synthetic_digest(self, block: int) -> str:
        """Digest of the added captions of a block's samples."""
        start, stop = self.layout.bounds(block)
        digest = hashlib.sha256()
        for index in self.samples.in_row_order[start:stop].tolist():
            digest.update(sample_digest(self.samples.key(index), self.samples.synthetic(index)))
        return digest.hexdigest()[:16]

    def block_metadata(self, part: Part, teacher: int, block: int) -> dict[str, str]:
        """The metadata a block of this store carries, without its checksum (and the digest of added captions)."""
        manifest = self.manifest
        start, stop = self.layout.bounds(block)
        views = [manifest.views, manifest.view_seed, as_dict(manifest.view_policy) if manifest.view_policy else None]
        fields = {"format": str(FORMAT), "part": part, "rows": f"{start}-{stop}", "keys": self.keys_digest(block)}
        if part != "synthetic":
            fields["views"] = digest_of(views)
        if part != "views":
            entry = manifest.teachers[teacher]
            fields |= {
                "weights": entry.weights,
                "transform": digest_of(as_dict(entry.transform)),
                "tokenizer": entry.tokenizer,
                "precision": entry.precision,
                "logit_scale": repr(entry.logit_scale),
                "captions": manifest.captions,
                "dtype": manifest.dtype,
            }
        return fields

    def _open(self, part: Part, teacher: int, number: int) -> Block:
        block = self._files.open(self._name(part, teacher, number), self.block_metadata(part, teacher, number))
        self._check_shapes(block, part, teacher, number)
        return block

    def _check_shapes(self, block: Block, part: Part, teacher: int, number: int) -> None:
        start, stop = self.layout.bounds(number)
        rows, manifest = stop - start, self.manifest
        counts = self.samples.in_row_order[start:stop]
        shapes: dict[str, tuple[int, ...]]
        if part == "views":
            shapes = {"box": (rows, manifest.views, 4), "flip": (rows, manifest.views)}
        else:
            dim = manifest.teachers[teacher].dim
            texts = block.arrays["text"].shape[0] if part == "synthetic" and "text" in block.arrays else None
            texts = int(self.samples.captions[counts].sum()) if texts is None else texts
            shapes = {"text": (texts, dim), "text_start": (rows + 1,)}
            if part == "pairs":
                shapes |= {"image": (rows, 1 + manifest.views, dim), "valid": (rows,)}
            if manifest.dtype == "int8":
                count = groups(dim)
                shapes |= {f"{n}_scale": (*s[:-1], count) for n, s in shapes.items() if n in ("image", "text")}
            for name in ("image", "text"):
                if name in shapes and block.dtype(name) != STORED_NAME[manifest.dtype]:
                    raise InputError(
                        f"{block.path}: dtype: '{name}' is stored as {block.dtype(name) or 'nothing'}, the manifest "
                        f"says {manifest.dtype}"
                    )
        for name, shape in shapes.items():
            found = block.arrays[name].shape if name in block.arrays else None
            if found != shape:
                raise InputError(f"{block.path}: '{name}' has the shape {found} instead of {shape}")

    def block(self, part: Part, teacher: int, number: int) -> Block:
        """One block, opened once in a process; its metadata must be this store's."""
        key = (part, teacher, number)
        if key not in self._blocks:
            self._blocks[key] = self._open(part, teacher, number)
        return self._blocks[key]

    # --- reading -----------------------------------------------------------------------------------------------------

    def place(self, index: int) -> tuple[int, int]:
        """(block, position in it) of a sample."""
        row = int(self.samples.rows[index])
        block = int(self.layout.find(np.asarray(row)))
        return block, row - int(self.layout.starts[block])

    def valid(self, index: int) -> bool:
        block, position = self.place(index)
        return bool(self.block("pairs", 0, block).arrays["valid"][position])

    def view(self, index: int, number: int) -> View:
        if number == 0:
            return EVALUATION_VIEW
        block, position = self.place(index)
        return read_view(self.block("views", 0, block), position, number)

    def read(
        self, teacher: int, indices: Sequence[int], captions: Sequence[int], views: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        dtype, dim = self.manifest.dtype, self.dims[teacher]
        image, text = (np.zeros((len(indices), dim), _NUMPY[dtype]) for _ in range(2))
        scales = np.zeros((2, len(indices), groups(dim)), np.float16) if dtype == "int8" else None
        rows = self.samples.rows[np.asarray(indices, dtype=np.int64)]
        blocks = self.layout.find(rows)
        positions = rows - self.layout.starts[blocks]
        for i, (number, position, caption, view) in enumerate(
            zip(blocks.tolist(), positions.tolist(), captions, views, strict=True)
        ):
            arrays = self.block("pairs", teacher, number).arrays
            image[i] = arrays["image"][position, view]
            if scales is not None:
                scales[0, i] = arrays["image_scale"][position, view]
            if caption < 0:  # no caption is read: its row stays 0
                continue
            place = self._text_row(arrays, position, caption, indices[i])
            text[i] = arrays["text"][place]
            if scales is not None:
                scales[1, i] = arrays["text_scale"][place]
        image_scale, text_scale = (None, None) if scales is None else scales
        return unpack(image, image_scale, dtype), unpack(text, text_scale, dtype)

    def read_synthetic(self, teacher: int, indices: Sequence[int], captions: Sequence[int]) -> Tensor:
        dtype = self.manifest.dtype
        dim = self.dims[teacher]
        text = np.empty((len(indices), dim), _NUMPY[dtype])
        scale = np.empty((len(indices), groups(dim)), np.float16) if dtype == "int8" else None
        for i, (index, caption) in enumerate(zip(indices, captions, strict=True)):
            number, position = self.place(index)
            arrays = self.block("synthetic", teacher, number).arrays
            place = self._text_row(arrays, position, caption, index)
            text[i] = arrays["text"][place]
            if scale is not None:
                scale[i] = arrays["text_scale"][place]
        return unpack(text, scale, dtype)

    def stored(self, part: Part, teacher: int, index: int) -> dict[str, Tensor]:
        """What a block (not one of views) holds of one sample, bit by bit: `text` (captions, D) and, of pairs, `image`
        (1, 1 + views, D) and `valid` (1,); int8 rows have scales beside them."""
        number, position = self.place(index)
        arrays = self.block(part, teacher, number).arrays
        first, last = arrays["text_start"][position : position + 2].tolist()
        found = {}
        for name, array in arrays.items():
            if name == "text_start":
                continue
            rows = torch.from_numpy(
                array[slice(first, last) if "text" in name else slice(position, position + 1)].copy()
            )
            bf16 = self.manifest.dtype == "bf16" and name in ("image", "text")
            found[name] = rows.view(torch.int16).view(torch.bfloat16) if bf16 else rows
        return found

    def _text_row(self, arrays: dict[str, np.ndarray], position: int, caption: int, index: int) -> int:
        first, last = arrays["text_start"][position : position + 2].tolist()
        if not 0 <= caption < last - first:
            raise InputError(
                f"cache {self.folder}: '{self.samples.key(index)}' has {last - first} stored captions, "
                f"number {caption} was asked for"
            )
        return int(first + caption)


def _allow_open_files(count: int) -> None:
    """Every mapped block holds a descriptor: raise this process's limit where a store has more blocks than that."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1000
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
