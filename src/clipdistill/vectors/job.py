"""Embeddings of any number of pictures or texts into a file, part by part: what is done survives a kill.

Finished parts lie in OUT.parts/ until the file is whole; the same call again goes on with those that are missing. A
part has the checksum of its content and of the work it belongs to, and the file's own stands in OUT.json.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clipdistill.data.pairs import PairSource
from clipdistill.embed.encode import Encoder, open_encoder
from clipdistill.embed.names import on_cluster
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel
from clipdistill.runtime.console import Shown
from clipdistill.runtime.files import (
    digest_of,
    first_other,
    make_folder,
    new_file,
    read_json,
    require_place,
    sha256,
    write_json,
)
from clipdistill.runtime.locks import FolderLock
from clipdistill.runtime.progress import Meter
from clipdistill.vectors.files import Part, keys_beside, require_room, require_suffix, write_embeddings

FORMAT = 2
_SAMPLED = 64
"""Pictures whose bytes tell whether a set is still the same."""
_ASSEMBLING = "part-s are being put together"


@dataclass(frozen=True, repr=False)
class EmbedReport(Shown):
    """What `embed` wrote: the file, its rows and their width, (key, reason) of pictures left out, texts that were cut,
    whether nothing was left to do, and a sentence on what was found when the data were opened ('' for nothing)."""

    path: Path
    rows: int
    width: int
    left_out: list[tuple[str, str]] = field(default_factory=list)
    truncated: int = 0
    seconds: float = 0.0
    known: bool = False
    found: str = ""

    def __repr__(self) -> str:
        left_out = f"; {len(self.left_out)} left out, the first: {self.left_out[0][0]}" if self.left_out else ""
        left_out += f"; {self.found}" if self.found else ""
        return (
            f"{self.path}: {self.rows:,} rows of {self.width} numbers in {self.seconds:.1f} s; "
            f"{self.truncated} texts cut{left_out}{' (was finished before)' if self.known else ''}"
        )


class TextList:
    """Texts on their own; the key of each is its number, from 0."""

    def __init__(self, texts: Sequence[str], name: str = "texts") -> None:
        self.name, self._texts = name, texts

    def __len__(self) -> int:
        return len(self._texts)

    def entry(self, i: int) -> dict[str, Any]:
        """What is known of text i beside its embedding."""
        return {"key": str(i), "caption": 0, "text": self._texts[i]}

    def fingerprint(self) -> str:
        """SHA-256 over the texts in order."""
        from clipdistill.data.pairs import Strings, fingerprint

        return fingerprint(Strings.pack([]), Strings.pack(self._texts), [])


class CaptionList(TextList):
    """The captions of pairs, sample after sample."""

    def __init__(self, source: PairSource, most: int | None) -> None:
        self.name, self.source = f"captions of {source.name}", source
        counts = (len(source.captions(i)[:most]) for i in range(len(source)))
        self._ends = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def entry(self, i: int) -> dict[str, Any]:
        sample = bisect.bisect_right(self._ends, i)
        place = i - (self._ends[sample - 1] if sample else 0)
        return {"key": self.source.key(sample), "caption": place, "text": self.source.captions(sample)[place]}

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def embed_to_file(
    model: ClipModel,
    source: PairSource | TextList,
    out: Path,
    *,
    batch_size: int = 256,
    workers: int = 0,
    dtype: str = "float32",
    engine: str = "torch",
    part: int = 4096,
    progress: bool = True,
) -> EmbedReport:
    """Embed the pictures of a source, or texts, into the file `out`; called again, it goes on where it stopped.

    engine: what runs the towers (embed/engine.py); part: rows that are kept at a time. Raises InputError for a file of
    something else at `out`, work begun with other settings, and where no picture can be read.
    """
    start = time.perf_counter()
    part = math.ceil(part / batch_size) * batch_size  # a batch lies in one part: which parts are there changes no row
    require_suffix(out)
    if not len(source):
        raise InputError(f"{source.name}: nothing to embed in it")
    what = "texts" if isinstance(source, TextList) else "pictures"
    identity = {
        "what": what, "model": model.fingerprint(), "data": source.fingerprint(), "count": len(source), "dtype": dtype,
    }  # fmt: skip
    cluster = on_cluster(engine)
    towers = engine if cluster is None else cluster.towers
    if towers != "torch":
        identity["engine"] = towers
    if isinstance(source, PairSource):
        identity["pictures"] = source.images_fingerprint(_SAMPLED)
    description, folder = out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.parts")
    if out.exists() and (description.is_file() or not (folder / _ASSEMBLING).is_file()):
        return _finished(out, description, identity)
    require_room(out)
    require_place(description, "embeddings", (b'"identity"',))
    if out.suffix == ".npy":
        require_place(keys_beside(out), "keys", (b'{"key": ',))
    make_folder(folder, "embeddings")
    if other := first_other(folder, "part-", "identity.json", "lock"):
        raise InputError(f"{folder}: holds other things ({other}), and is where embeddings are kept until all are done")
    with FolderLock(folder / "lock", f"{folder} is being filled"):
        part = _begun(folder, identity, part)
        parts = _Parts(folder, digest_of({**identity, "part": part}))
        settings = {"batch_size": batch_size, "workers": workers, "dtype": dtype}
        encoder = open_encoder(model, engine=engine, progress=False, **settings)
        starts = range(0, len(source), part)
        missing = [first for first in starts if _read(parts, first) is None]
        done = sum(min(part, len(source) - first) for first in set(starts) - set(missing))
        with Meter(f"{what} of {source.name}", len(source), done, enabled=progress) as meter:
            if isinstance(source, TextList):
                _embed_texts(encoder, source, parts, missing, part, meter.advance)
            else:
                _embed_pictures(encoder, source, parts, missing, part, meter.advance)
        about = {"clipdistill.model": str(identity["model"])}
        report = _assemble(source, out, parts, starts, model.embed_dim, time.perf_counter() - start, about)
        details = {"format": FORMAT, "identity": identity, "model": model.name, "data": source.name}
        details |= {"rows": report.rows, "width": report.width}
        details |= {"left_out": report.left_out, "truncated": report.truncated, "notes": encoder.notes(model.name)}
        write_json(description, {**details, "files": [sha256(path) for path in _files(out)]}, checked=True)
    shutil.rmtree(folder, ignore_errors=True)
    return report


@dataclass(frozen=True)
class _Parts:
    """Where parts lie, and the digest of the work that they belong to."""

    folder: Path
    work: str

    def path(self, first: int) -> Path:
        return self.folder / f"part-{first:012d}.safetensors"

    def digest(self, first: int, tensors: dict[str, np.ndarray], bad: str, truncated: str) -> str:
        """sha256 (hex) of a part."""
        found = hashlib.sha256(json.dumps([self.work, first, bad, truncated]).encode())
        for name in sorted(tensors):
            found.update(np.ascontiguousarray(tensors[name]).tobytes())
        return found.hexdigest()


def _files(out: Path) -> list[Path]:
    if out.suffix == ".lance":
        return sorted((out / "data").glob("*.lance"))
    return [out, keys_beside(out)] if out.suffix == ".npy" else [out]


def _finished(out: Path, description: Path, identity: dict[str, Any]) -> EmbedReport:
    again = f"remove it and {out.name}, and give the same command again"
    if not description.is_file():
        raise InputError(f"{out}: is there already, and not from clipdistill embed: choose another place")
    known = read_json(description, again)
    _require_same(known.get("identity"), identity, f"{out}: is there already, from")
    try:
        left_out = [(str(key), str(reason)) for key, reason in known["left_out"]]
        report = EmbedReport(out, known["rows"], known["width"], left_out, known["truncated"], known=True)
        recorded = known["files"] if known["format"] != 1 else None  # the first format had no checksums
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{description}: is no description of embeddings: {again}") from error
    if recorded is not None and recorded != [sha256(path) if path.is_file() else None for path in _files(out)]:
        raise InputError(f"{out}: is not what {description.name} recorded: {again}")
    if recorded is not None:  # what a kill at the very end left
        shutil.rmtree(out.with_name(f"{out.name}.parts"), ignore_errors=True)
    return report


def _begun(folder: Path, identity: dict[str, Any], part: int) -> int:
    """Rows a part of the work in the folder, which is begun here where none is."""
    path = folder / "identity.json"
    if not path.is_file():
        write_json(path, {**identity, "part": part}, checked=True)
        return part
    found = read_json(path, f"remove {folder}, and give the same command again")
    _require_same(found, identity, f"{folder}: begun with")
    kept = found.get("part")
    return kept if isinstance(kept, int) and kept > 0 else part


def _require_same(found: Any, identity: dict[str, Any], begins: str) -> None:
    """Raise InputError when what was found is of other work."""
    found = found if isinstance(found, dict) else {}
    other = next((name for name, value in identity.items() if found.get(name) != value), None)
    if other is not None:
        other = {"model": "another model", "data": "other data", "pictures": "other pictures"}.get(
            other, f"another {other}"
        )
        raise InputError(f"{begins} {other}: choose another place, or remove it")


def _embed_texts(
    encoder: Encoder, source: TextList, parts: _Parts, missing: Sequence[int], part: int, advance: Callable[..., None]
) -> None:
    if missing and encoder.engine != "torch":
        sample = sorted((source.entry(i)["text"] for i in range(min(64, len(source)))), key=len)
        tokens = encoder.model.shorten(encoder.model.tokenizer(sample[len(sample) // 2 :]))[0]
        encoder.expected["text"] = len(source)
        encoder.settle("text", tokens.to(encoder.device))
    numbers = [range(first, min(first + part, len(source))) for first in missing]
    texts = ([source.entry(i)["text"] for i in own] for own in numbers)
    for place, rows, cut in encoder.text_parts(texts, source.name):
        _write(parts, missing[place], rows.numpy(), list(numbers[place]), [], cut)
        advance(len(rows))


def _embed_pictures(
    encoder: Encoder, source: PairSource, parts: _Parts, missing: Sequence[int], part: int, advance: Callable[..., None]
) -> None:
    size = {first: min(part, len(source) - first) for first in missing}
    good: dict[int, list[tuple[int, np.ndarray]]] = {first: [] for first in missing}
    bad: dict[int, list[tuple[int, str]]] = {first: [] for first in missing}
    indices = [i for first in missing for i in range(first, first + size[first])]
    for rows, found, failed in encoder.stream(source, indices):
        for i, row in zip(found, rows.numpy()):
            good[i // part * part].append((i, row))
        for i, reason in failed:
            bad[i // part * part].append((i, reason))
        advance(len(found) + len(failed))
        for first in {i // part * part for i in [*found, *(i for i, _ in failed)]}:
            if len(good[first]) + len(bad[first]) == size[first]:
                order = sorted(good.pop(first), key=lambda pair: pair[0])
                left_out = [(source.key(i), reason) for i, reason in sorted(bad.pop(first))]
                whole = (
                    np.stack([row for _, row in order]) if order else np.zeros((0, encoder.model.embed_dim), np.float32)
                )
                _write(parts, first, whole, [i for i, _ in order], left_out, 0)


def _write(
    parts: _Parts, first: int, rows: np.ndarray, indices: list[int], bad: list[tuple[str, str]], truncated: int
) -> None:
    tensors = {"rows": np.ascontiguousarray(rows), "indices": np.asarray(indices, dtype=np.int64)}
    notes = {"bad": json.dumps(bad), "truncated": str(truncated)}
    with new_file(parts.path(first)) as new:
        save_file(tensors, new, {**notes, "sha256": parts.digest(first, tensors, **notes)})


def _read(parts: _Parts, first: int) -> tuple[np.ndarray, list[int], list[tuple[str, str]], int] | None:
    """(rows, indices, left out, truncated) of a part; None where it is missing, damaged or of other work."""
    try:
        with safe_open(parts.path(first), framework="np") as file:
            notes = file.metadata()
            tensors = {name: file.get_tensor(name) for name in ("rows", "indices")}
            if notes["sha256"] != parts.digest(first, tensors, notes["bad"], notes["truncated"]):
                return None
            bad = [(key, reason) for key, reason in json.loads(notes["bad"])]
            return tensors["rows"], tensors["indices"].tolist(), bad, int(notes["truncated"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _assemble(
    source: PairSource | TextList,
    out: Path,
    parts: _Parts,
    starts: Sequence[int],
    width: int,
    seconds: float,
    about: dict[str, str],
) -> EmbedReport:
    rows, truncated, left_out = 0, 0, []
    for first in starts:
        found = _read(parts, first)
        if found is None:
            raise InputError(f"{parts.folder}: the part from row {first} on has vanished: give the same command again")
        rows += len(found[1])
        left_out += found[2]
        truncated += found[3]
    if not rows:
        key, reason = left_out[0]
        shutil.rmtree(parts.folder, ignore_errors=True)
        raise InputError(f"no picture of {source.name} can be read (the first, {key}: {reason})")

    def whole() -> Iterator[Part]:
        for first in starts:
            part = _read(parts, first)
            assert part is not None
            texts = isinstance(source, TextList)
            yield part[0], [source.entry(i) if texts else {"key": source.key(i)} for i in part[1]]  # type: ignore[union-attr]

    (parts.folder / _ASSEMBLING).touch()
    write_embeddings(out, rows, width, whole(), about)
    return EmbedReport(out, rows, width, left_out, truncated, seconds)
