"""Embeddings of any number of pictures or texts into a file, part by part: what is done survives a kill.

Finished parts lie in OUT.parts/ until the file is whole; the same call again goes on with those that are missing.
"""

from __future__ import annotations

import bisect
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
from clipdistill.runtime.files import make_folder, new_file, read_json, require_place, write_json
from clipdistill.runtime.locks import FolderLock
from clipdistill.runtime.progress import Meter
from clipdistill.vectors.files import Part, require_suffix, write_embeddings

FORMAT = 1


@dataclass(frozen=True)
class EmbedReport:
    """What `embed` wrote: the file, its rows and their width, (key, reason) of pictures left out, texts that were cut,
    and whether nothing was left to do."""

    path: Path
    rows: int
    width: int
    left_out: list[tuple[str, str]] = field(default_factory=list)
    truncated: int = 0
    seconds: float = 0.0
    known: bool = False


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
        identity["pictures"] = source.images_fingerprint()
    description = out.with_name(f"{out.name}.json")
    if out.exists():
        return _finished(out, description, identity)
    require_place(out, "embeddings")
    folder = make_folder(out.with_name(f"{out.name}.parts"), "embeddings")
    with FolderLock(folder / "lock", f"{folder} is being filled"):
        _require_same(folder / "identity.json", identity, f"{folder}: begun with")
        settings = {"batch_size": batch_size, "workers": workers, "dtype": dtype}
        encoder = open_encoder(model, engine=engine, progress=False, **settings)
        starts = range(0, len(source), part)
        missing = [first for first in starts if not _is_there(folder, first, min(part, len(source) - first))]
        done = sum(min(part, len(source) - first) for first in set(starts) - set(missing))
        with Meter(f"{what} of {source.name}", len(source), done, enabled=progress) as meter:
            if isinstance(source, TextList):
                _embed_texts(encoder, source, folder, missing, part, meter.advance)
            else:
                _embed_pictures(encoder, source, folder, missing, part, meter.advance)
        report = _assemble(source, out, folder, starts, model.embed_dim, time.perf_counter() - start)
        details = {"format": FORMAT, "identity": identity, "model": model.name, "data": source.name}
        details |= {"rows": report.rows, "width": report.width}
        details |= {"left_out": report.left_out, "truncated": report.truncated, "notes": encoder.notes(model.name)}
        write_json(description, details)
    shutil.rmtree(folder, ignore_errors=True)
    return report


def _finished(out: Path, description: Path, identity: dict[str, Any]) -> EmbedReport:
    if not description.is_file():
        raise InputError(f"{out}: is there already, and not from clipdistill embed: choose another place")
    _require_same(description, identity, f"{out}: is there already, from", "identity")
    known = read_json(description)
    left_out = [(key, reason) for key, reason in known["left_out"]]
    return EmbedReport(out, known["rows"], known["width"], left_out, known["truncated"], known=True)


def _require_same(path: Path, identity: dict[str, Any], begins: str, key: str | None = None) -> None:
    """Raise InputError when the file describes other work; write it where it is not there."""
    if not path.is_file():
        write_json(path, identity)
        return
    found = read_json(path)
    found = found if key is None else found.get(key, {})
    other = next((name for name, value in identity.items() if found.get(name) != value), None)
    if other is not None:
        other = {"model": "another model", "data": "other data", "pictures": "other pictures"}.get(
            other, f"another {other}"
        )
        raise InputError(f"{begins} {other}: choose another place, or remove it")


def _embed_texts(
    encoder: Encoder, source: TextList, folder: Path, missing: Sequence[int], part: int, advance: Callable[..., None]
) -> None:
    if missing and encoder.engine != "torch":
        sample = sorted((source.entry(i)["text"] for i in range(min(64, len(source)))), key=len)
        tokens = encoder.model.shorten(encoder.model.tokenizer(sample[len(sample) // 2 :]))[0]
        encoder.expected["text"] = len(source)
        encoder.settle("text", tokens.to(encoder.device))
    numbers = [range(first, min(first + part, len(source))) for first in missing]
    texts = ([source.entry(i)["text"] for i in own] for own in numbers)
    for place, rows, cut in encoder.text_parts(texts, source.name):
        _write(folder, missing[place], rows.numpy(), list(numbers[place]), [], cut)
        advance(len(rows))


def _embed_pictures(
    encoder: Encoder, source: PairSource, folder: Path, missing: Sequence[int], part: int, advance: Callable[..., None]
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
                _write(folder, first, whole, [i for i, _ in order], left_out, 0)


def _write(
    folder: Path, first: int, rows: np.ndarray, indices: list[int], bad: list[tuple[str, str]], truncated: int
) -> None:
    tensors = {"rows": np.ascontiguousarray(rows), "indices": np.asarray(indices, dtype=np.int64)}
    with new_file(_part(folder, first)) as new:
        save_file(tensors, new, {"bad": json.dumps(bad), "truncated": str(truncated)})


def _part(folder: Path, first: int) -> Path:
    return folder / f"part-{first:012d}.safetensors"


def _read(folder: Path, first: int) -> tuple[np.ndarray, list[int], list[tuple[str, str]], int] | None:
    """(rows, indices, left out, truncated) of a part; None where it is missing or cut short."""
    try:
        with safe_open(_part(folder, first), framework="np") as file:
            notes = file.metadata()
            bad = [(key, reason) for key, reason in json.loads(notes["bad"])]
            return file.get_tensor("rows"), file.get_tensor("indices").tolist(), bad, int(notes["truncated"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _is_there(folder: Path, first: int, size: int) -> bool:
    """Whether a part is whole and of this size (`part` may have been another one)."""
    found = _read(folder, first)
    return found is not None and len(found[1]) + len(found[2]) == size


def _assemble(
    source: PairSource | TextList, out: Path, folder: Path, starts: Sequence[int], width: int, seconds: float
) -> EmbedReport:
    rows, truncated, left_out = 0, 0, []
    for first in starts:
        found = _read(folder, first)
        if found is None:
            raise InputError(f"{folder}: the part from row {first} on has vanished: give the same command again")
        rows += len(found[1])
        left_out += found[2]
        truncated += found[3]
    if not rows:
        key, reason = left_out[0]
        raise InputError(f"no picture of {source.name} can be read (the first, {key}: {reason})")

    def parts() -> Iterator[Part]:
        for first in starts:
            part = _read(folder, first)
            assert part is not None
            texts = isinstance(source, TextList)
            yield part[0], [source.entry(i) if texts else {"key": source.key(i)} for i in part[1]]  # type: ignore[union-attr]

    write_embeddings(out, rows, width, parts())
    return EmbedReport(out, rows, width, left_out, truncated, seconds)
