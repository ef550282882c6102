"""What a WebDataset shard holds: one row a sample, with captions and the image's place; remembered between runs.

Member names follow WebDataset: the sample is named by everything before the first dot of the file name, the rest is the
component ('000012.jpg', '000012.txt', '000012.json'). Duplicate rule: a component that the sample already has starts
another sample of the same name, whose key gets '#2', '#3', ...
The index of a shard is kept in the user's cache folder (numpy .npz without pickles), under its path, size and time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipdistill.data.captions import MISSING, clean_all
from clipdistill.data.files import PICTURES, UNREAD, UNREAD_SUFFIXES
from clipdistill.data.formats.tar_headers import DamagedTar, Member, members
from clipdistill.data.pairs import Strings, ends_of
from clipdistill.data.problems import Problems
from clipdistill.runtime.files import decoded, lines_of, new_file, once

FORMAT = 7
TEXTS = ("txt", "json")
LINES = "txt:lines"
_LARGEST_TEXT = 1 << 24  # bytes of a .txt or .json member that are read
DUPLICATE = "duplicate member name"


@dataclass
class ShardIndex:
    """The samples of one shard in the order of their first member: stems, places of the images (int64), captions and
    how many of them each has."""

    stems: Strings
    offsets: np.ndarray
    sizes: np.ndarray
    captions: Strings
    counts: np.ndarray
    problems: Problems = field(default_factory=Problems)

    @classmethod
    def of(
        cls, rows: Sequence[tuple[str, int, int, Sequence[str]]] = (), problems: Problems | None = None
    ) -> ShardIndex:
        """From (stem, offset, size, captions) of each sample."""
        numbers = np.array([(offset, size, len(texts)) for _, offset, size, texts in rows], dtype=np.int64)
        offsets, sizes, counts = numbers.reshape(-1, 3).T.copy()
        stems, captions = Strings.pack(row[0] for row in rows), Strings.pack(c for row in rows for c in row[3])
        return cls(stems, offsets, sizes, captions, counts, problems or Problems())


@dataclass
class Sample:
    """The members of one name by their components; `others`: components that are not read."""

    stem: str
    components: dict[str, Member] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def image(self) -> Member | None:
        return next((self.components[kind] for kind in PICTURES if kind in self.components), None)

    @property
    def why_no_image(self) -> str:
        """The reason to count it under when it has no image."""
        unread = next((kind for kind in self.others if f".{kind}" in UNREAD_SUFFIXES), None)
        return f"{UNREAD}: .{unread}" if unread else "sample without image"


def index_shard(path: Path, label: str, column: str | None = None) -> ShardIndex:
    """Scan a shard, or take what an earlier run remembered. Damage is counted under `label`, what is whole is used.

    column: where captions are instead of the usual places: a key of the .json, 'txt', or LINES for a .txt with one
    caption a line; '': pictures alone.
    """
    try:
        status = path.stat()
        remembered = _cache_file(path, column)
        key = json.dumps([FORMAT, str(path.resolve()), status.st_size, status.st_mtime_ns, label, column])
        index = _recall(remembered, key)
        if index is None:
            with path.open("rb") as file:
                index = _scan(file, status.st_size, label, column)
            _remember(remembered, key, index)
    except OSError as error:
        index = ShardIndex.of()
        index.problems.add(f"unreadable shard: {error.strerror or error}", label)
    return index


def samples_of(file: BinaryIO, length: int, label: str, texts: Sequence[str], problems: Problems) -> list[Sample]:
    """The samples of a shard in the order of their first members, with their images and the components `texts`."""
    groups: dict[str, list[Sample]] = {}
    samples: list[Sample] = []

    def passed(name: str, kind: str) -> None:
        if "__MACOSX" not in name.split("/"):
            problems.add(f"{kind} inside an archive", f"{label}/{name}")

    try:
        for member in members(file, length, passed):
            folder, _, name = member.name.rpartition("/")
            stem, _, component = name.partition(".")
            component = component.lower()
            if not stem or not component or "__MACOSX" in folder.split("/"):
                # as WebDataset: files without an ending, and hidden ones, are no samples
                if not stem and component.rpartition(".")[2] in PICTURES and not name.startswith("._"):
                    problems.add("hidden image", f"{label}/{member.name}")
                continue
            stem = f"{folder}/{stem}" if folder else stem
            stem = stem.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            group = groups.setdefault(stem, [])
            known = component in PICTURES or component in texts
            ending = component.rpartition(".")[2]
            if not known and "." in component and (ending in PICTURES or ending in texts):
                reason = f"dotted member name: a sample's name ends at its first dot, so this is no .{ending}"
                problems.add(reason, f"{label}/{member.name}", dropped=ending in PICTURES)
                continue
            if known and group and component in group[-1].components:
                problems.add(DUPLICATE, f"{label}/{member.name}")
            if not group or (known and component in group[-1].components):
                group.append(Sample(stem))
                samples.append(group[-1])
            if known:
                group[-1].components[component] = member
            else:
                group[-1].others.append(component)
    except DamagedTar as error:
        problems.add(str(error), label)
    return samples


def _scan(file: BinaryIO, length: int, label: str, column: str | None) -> ShardIndex:
    problems, rows = Problems(), []
    seen: dict[str, int] = {}
    for sample in samples_of(file, length, label, TEXTS, problems):
        seen[sample.stem] = count = seen.get(sample.stem, 0) + 1
        stem = sample.stem if count == 1 else f"{sample.stem}#{count}"
        key, image = f"{label}/{stem}", sample.image
        if image is None:
            problems.add(sample.why_no_image, key, dropped=True)
            continue
        for kind in [kind for kind in PICTURES if kind in sample.components][1:]:
            problems.add("image beside another of the same name", f"{key}.{kind}")
        captions = [] if column == "" else _captions(file, sample.components, key, column, problems)
        if not captions and column != "":
            problems.add("image without caption", key, dropped=True)
            continue
        rows.append((stem, image.offset, image.size, captions))
    return ShardIndex.of(rows, problems)


def _captions(
    file: BinaryIO, components: dict[str, Member], key: str, column: str | None, problems: Problems
) -> list[str]:
    """The 'captions' of the .json, else the .txt, else the 'caption' of the .json; or what `column` names."""
    record: dict[str, Any] = {}
    if "json" in components:
        try:
            document = decoded(_read(file, components["json"]))
            content = json.loads(document, object_pairs_hook=once)
            record = content if isinstance(content, dict) else {}
        except (ValueError, RecursionError):
            problems.add("unreadable json", key)
    places = ("captions", "txt", "caption") if column is None else (column,)
    found = False
    for place in places:
        if place in ("txt", LINES):
            text = decoded(_read(file, components["txt"])) if "txt" in components else ""
            values: Any = lines_of(text) if place == LINES else [text] * ("txt" in components)
        else:
            values = record.get(place) or []
            values = values if isinstance(values, list) else [values]
        found = found or bool(values)
        captions = clean_all(values, key, problems)
        if captions:
            return captions
    if not found:
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


def _cache_file(path: Path, column: str | None) -> Path | None:
    try:
        about = f"{path.resolve()}\0{column}" if column else str(path.resolve())
        name = hashlib.sha256(about.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return cache_folder() / "tar-index" / f"{name}.npz"
    except (OSError, RuntimeError):  # no home folder
        return None


def _recall(file: Path | None, key: str) -> ShardIndex | None:
    """A remembered index if it belongs to exactly this file; anything unreadable is simply scanned again."""
    if file is None or not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            packed = {name: stored[name] for name in stored.files}
        if str(packed.pop("sha256")) != _digest(packed):
            return None
        stems, captions = (
            Strings(packed[name], packed[ends])
            for name, ends in (("stems", "stem_offsets"), ("captions", "caption_offsets"))
        )
        found = json.loads(str(packed["problems"]))
        index = ShardIndex(stems, packed["offsets"], packed["sizes"], captions, np.diff(packed["starts"]))
        index.problems.counts.update(found["counts"])
        index.problems.rows = [(str(k), str(r)) for k, r in found["rows"]]
        index.problems.dropped = int(found["dropped"])
    except Exception:  # zipfile and numpy raise almost any type on damaged archives
        return None
    return index


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 (hex) of arrays by name."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _remember(file: Path | None, key: str, index: ShardIndex) -> None:
    """Keep an index for the next run; a cache folder that cannot be written is no reason to stop."""
    if file is None:
        return
    stems, captions = index.stems, index.captions
    problems = {"counts": index.problems.counts, "rows": index.problems.rows, "dropped": index.problems.dropped}
    arrays: dict[str, Any] = {
        **{"key": np.array(key), "stems": stems.buffer, "stem_offsets": stems.offsets},
        **{"captions": captions.buffer, "caption_offsets": captions.offsets},
        **{"starts": ends_of(index.counts), "problems": np.array(json.dumps(problems))},
        **{"offsets": index.offsets, "sizes": index.sizes},
    }
    with contextlib.suppress(OSError, ValueError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as temporary, temporary.open("wb") as handle:
            np.savez(handle, **arrays, sha256=np.array(_digest(arrays)))
