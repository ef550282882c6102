"""What a WebDataset shard holds: one row a sample, with captions and the image's place; remembered between runs.

Member names follow WebDataset: the sample is named by everything before the first dot of the file name, the rest is the
component ('000012.jpg', '000012.txt', '000012.json'). Duplicate rule: a component that the sample already has starts
another sample of the same name, whose key gets '#2', '#3', ...
The index of a shard is kept in the user's cache folder (numpy .npz without pickles), under its path, size and time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipdistill.data.captions import EMPTY, MISSING, clean_all
from clipdistill.data.formats.tar_headers import DamagedTar, Member, members
from clipdistill.data.pairs import Strings
from clipdistill.data.problems import Problems

FORMAT = 3
IMAGE_COMPONENTS = ("jpg", "jpeg", "png", "webp")
_LARGEST_TEXT = 1 << 24  # bytes of a .txt or .json member that are read
DUPLICATE = "duplicate member name"


@dataclass
class ShardIndex:
    """The samples of one shard in the order of their first member: stems, places of the images, captions of each."""

    stems: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)


@dataclass
class _Sample:
    stem: str
    components: dict[str, Member]


def index_shard(path: Path, label: str) -> ShardIndex:
    """Scan a shard, or take what an earlier run remembered. Damage is counted under `label`, what is whole is used.

    Raises OSError when the file cannot be opened.
    """
    status = path.stat()
    remembered = _cache_file(path)
    key = json.dumps([FORMAT, str(path.resolve()), status.st_size, status.st_mtime_ns, label])
    index = _recall(remembered, key, status.st_size)
    if index is None:
        with path.open("rb") as file:
            index = _scan(file, status.st_size, label)
        _remember(remembered, key, index)
    return index


def _scan(file: BinaryIO, length: int, label: str) -> ShardIndex:
    index = ShardIndex()
    groups: dict[str, list[_Sample]] = {}
    samples: list[_Sample] = []
    try:
        for member in members(file, length):
            folder, _, name = member.name.rpartition("/")
            stem, _, component = name.partition(".")
            component = component.lower()
            if not stem or component not in (*IMAGE_COMPONENTS, "txt", "json"):
                continue  # other components, and files beside the samples
            stem = f"{folder}/{stem}" if folder else stem
            stem = stem.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            group = groups.setdefault(stem, [])
            if group and component in group[-1].components:
                index.problems.add(DUPLICATE, f"{label}/{member.name}")
            if not group or component in group[-1].components:
                group.append(_Sample(stem, {}))
                samples.append(group[-1])
            group[-1].components[component] = member
    except DamagedTar as error:
        reason = str(error)
        name, _, detail = reason.partition(": ")
        index.problems.add(f"{name}: {detail}" if detail else name, label)
    seen: dict[str, int] = {}
    for sample in samples:
        seen[sample.stem] = count = seen.get(sample.stem, 0) + 1
        stem = sample.stem if count == 1 else f"{sample.stem}#{count}"
        key = f"{label}/{stem}"
        image = next((sample.components[c] for c in IMAGE_COMPONENTS if c in sample.components), None)
        if image is None:
            index.problems.add("sample without image", key, dropped=True)
            continue
        captions = _captions(file, sample.components, key, index.problems)
        if not captions:
            index.problems.add("image without caption", key, dropped=True)
            continue
        index.stems.append(stem)
        index.offsets.append(image.offset)
        index.sizes.append(image.size)
        index.captions.append(captions)
    return index


def _captions(file: BinaryIO, components: dict[str, Member], key: str, problems: Problems) -> list[str]:
    """The 'captions' of the .json, else the .txt, else the 'caption' of the .json."""
    record: dict[str, Any] = {}
    if "json" in components:
        try:
            content = json.loads(_read(file, components["json"]).decode("utf-8-sig", "surrogateescape"))
            record = content if isinstance(content, dict) else {}
        except (ValueError, RecursionError):
            problems.add("unreadable json", key)
    several = record.get("captions")
    if isinstance(several, list) and several:
        captions = clean_all(several, key, problems)
        if captions:
            return captions
    if "txt" in components:
        captions = clean_all([_read(file, components["txt"])], key, problems)
        if captions:
            return captions
    if "caption" in record:
        return clean_all([record["caption"]], key, problems)
    if not problems.rows or problems.rows[-1] != (key, EMPTY):
        problems.add(MISSING, key)
    return []


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(min(member.size, _LARGEST_TEXT))


def cache_folder() -> Path:
    """Where indexes are kept: CLIPDISTILL_CACHE, else the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    own = os.environ.get("CLIPDISTILL_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipdistill"


def _cache_file(path: Path) -> Path | None:
    try:
        name = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return cache_folder() / "tar-index" / f"{name}.npz"
    except (OSError, RuntimeError):  # no home folder
        return None


def _recall(file: Path | None, key: str, length: int) -> ShardIndex | None:
    """A remembered index if it belongs to exactly this file; anything unreadable is simply scanned again."""
    if file is None or not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            packed = {name: stored[name] for name in stored.files}
        captions = list(Strings(packed["captions"], packed["caption_offsets"]))
        starts = packed["starts"].tolist()
        found = json.loads(str(packed["problems"]))
        index = ShardIndex(
            list(Strings(packed["stems"], packed["stem_offsets"])),
            packed["offsets"].tolist(),
            packed["sizes"].tolist(),
            [captions[a:b] for a, b in itertools.pairwise(starts)],
        )
        index.problems.counts.update(found["counts"])
        index.problems.rows = [(str(k), str(r)) for k, r in found["rows"]]
        index.problems.dropped = int(found["dropped"])
        counts = {len(index.stems), len(index.offsets), len(index.sizes), len(index.captions)}
        whole = len(counts) == 1 and len(set(index.stems)) == len(index.stems) and starts[-1:] == [len(captions)]
        inside = all(0 <= at <= at + size <= length for at, size in zip(index.offsets, index.sizes))
        filled = all(captions) and all(index.captions)
    except Exception:  # zipfile and numpy raise almost any type on damaged archives
        return None
    return index if whole and inside and filled else None


def _remember(file: Path | None, key: str, index: ShardIndex) -> None:
    """Keep an index for the next run; a cache folder that cannot be written is no reason to stop."""
    if file is None:
        return
    stems, captions = Strings.pack(index.stems), Strings.pack(c for group in index.captions for c in group)
    problems = {"counts": index.problems.counts, "rows": index.problems.rows, "dropped": index.problems.dropped}
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as handle:
            temporary = Path(handle.name)
            np.savez(
                handle,
                key=np.array(key),
                stems=stems.buffer,
                stem_offsets=stems.offsets,
                captions=captions.buffer,
                caption_offsets=captions.offsets,
                starts=np.cumsum([0, *(len(c) for c in index.captions)]),
                offsets=np.array(index.offsets, dtype=np.int64),
                sizes=np.array(index.sizes, dtype=np.int64),
                problems=np.array(json.dumps(problems)),
            )
        temporary.replace(file)
    except (OSError, ValueError):
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
