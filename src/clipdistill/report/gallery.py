"""The retrieval gallery: for some queries, what the teacher and each student retrieve, hits and misses marked.

`build_gallery` makes the JSON-able dictionary that a run folder keeps as gallery.json; `read_galleries` reads such
files back for the report. Pictures travel as thumbnails in data URIs. On reading, every one is decoded and encoded
again by us, so that nothing but pixels reaches the page whoever wrote the file.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipdistill.data.pairs import PairSource
from clipdistill.embed.encode import EncodedPairs
from clipdistill.errors import InputError
from clipdistill.report.data import Run, read_optional
from clipdistill.report.tables import Entry, ScoreTable

THUMBNAIL = 144
"""Longest side of a thumbnail in pixels."""

_MAX_PIXELS = 4_000_000  # a thumbnail is far smaller; more is not one of ours


@dataclass
class Answer:
    """One retrieved item: a picture (`key`) or a caption (`text`)."""

    key: str
    text: str
    score: float
    hit: bool


@dataclass
class Query:
    """One query and the answers by entry; rank: where the first right answer stands for each entry (1 is best)."""

    kind: str
    text: str
    key: str
    why: str
    answers: list[tuple[Entry, list[Answer], int | None]] = field(default_factory=list)


@dataclass
class Gallery:
    """Queries with re-encoded thumbnails (key -> (data URI, width, height)) and how the queries were chosen."""

    queries: list[Query]
    thumbnails: dict[str, tuple[str, int, int]]
    selection: str
    notices: list[str]


def build_gallery(
    models: Mapping[str, EncodedPairs],
    source: PairSource,
    *,
    queries: int = 12,
    top: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """What each model retrieves for the same queries, ready to be written as gallery.json.

    models: name ("teacher", the run's name, ...) -> embeddings of `source`, all of the same samples and captions.
    queries: how many in all; two thirds text to image, the rest image to text. Half of each kind are drawn at random,
    half are those on which the models disagree most, and each says which.
    Raises InputError when the models were not measured on the same samples.
    """
    if not models:
        raise InputError("a gallery needs at least one model's embeddings")
    reference = next(iter(models.values()))
    for name, encoded in models.items():
        same = (
            list(encoded.keys) == list(reference.keys)
            and list(encoded.captions) == list(reference.captions)
            and torch.equal(
                torch.as_tensor(encoded.text_to_image).cpu(), torch.as_tensor(reference.text_to_image).cpu()
            )
        )
        if not same:
            raise InputError(f"gallery: '{name}' was not encoded on the same samples as '{next(iter(models))}'")
    owner = torch.as_tensor(reference.text_to_image).cpu().long()
    keys = list(reference.keys)
    position = {source.key(i): i for i in range(len(source))}
    missing = next((key for key in keys if key not in position), None)
    if missing is not None:
        raise InputError(f"gallery: the embeddings hold the sample '{missing}', which is not in the pair source")
    texts = list(reference.captions)
    wanted_text = min(len(texts), max(1, (2 * queries + 2) // 3))
    wanted_image = min(len(keys), max(0, queries - wanted_text))
    generator = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    used: set[str] = set()
    for text, why in _choose(_ranks_of_images(models, owner), wanted_text, generator):
        truth = int(owner[text])
        query: dict[str, Any] = {
            "kind": "t2i",
            "text": texts[text],
            "truth": keys[truth],
            "why": why,
            "models": {},
            "ranks": {},
        }
        for name, encoded in models.items():
            scores = encoded.image.float() @ encoded.text[text].float()
            best = _top(scores, top)
            query["models"][name] = [
                {"key": keys[i], "score": round(float(scores[i]), 4), "hit": i == truth} for i in best
            ]
            query["ranks"][name] = _rank(scores, [truth])
            used.update(keys[i] for i in best)
        used.add(keys[truth])
        found.append(query)
    for image, why in _choose(_ranks_of_texts(models, owner, len(keys)), wanted_image, generator):
        own = [int(t) for t in torch.nonzero(owner == image).flatten()]
        query = {"kind": "i2t", "image": keys[image], "why": why, "models": {}, "ranks": {}}
        for name, encoded in models.items():
            scores = encoded.text.float() @ encoded.image[image].float()
            query["models"][name] = [
                {"text": texts[i], "score": round(float(scores[i]), 4), "hit": int(owner[i]) == image}
                for i in _top(scores, top)
            ]
            query["ranks"][name] = _rank(scores, own)
        used.add(keys[image])
        found.append(query)
    thumbnails = {key: thumbnail(source.image(position[key])) for key in sorted(used)}
    selection = (
        f"Half of the {len(found)} queries were drawn at random (seed {seed}) from {len(texts):,} captions and "
        f"{len(keys):,} images, half are those on which the models disagree most."
    )
    return {"format": 1, "selection": selection, "queries": found, "thumbnails": thumbnails}


def thumbnail(picture: Image.Image) -> str:
    """A JPEG data URI of at most THUMBNAIL pixels a side."""
    return _encode(picture)[0]


def reencode(uri: str) -> tuple[str, int, int] | None:
    """(our own JPEG data URI, width, height) of a picture given as a data URI, None when it is not a small picture."""
    head, _, body = uri.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        return None
    try:
        data = base64.b64decode(body, validate=True)
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.width * image.height > _MAX_PIXELS:
                return None
            return _encode(image.convert("RGB"))
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def read_galleries(runs: Sequence[Run], table: ScoreTable) -> Gallery | None:
    """The galleries in and beside the run folders, merged query by query; None when there is none."""
    stored = read_optional(runs, "gallery.json")
    if not stored:
        return None
    merged: dict[tuple[str, str, str], Query] = {}
    thumbnails: dict[str, tuple[str, int, int]] = {}
    notices: list[str] = []
    selections: dict[str, None] = {}
    extras: dict[str, Entry] = {}
    for path, owner, gallery in stored:
        pictures = gallery.get("thumbnails")
        if not isinstance(gallery.get("queries"), list) or not isinstance(pictures, dict):
            raise InputError(f"{path}: expected the keys 'queries' and 'thumbnails' of a retrieval gallery")
        for key, uri in pictures.items():
            if key not in thumbnails:
                safe = reencode(uri) if isinstance(uri, str) else None
                if safe is None:
                    notices.append(f"{path.name}: the thumbnail of '{key}' is not a picture and was left out.")
                else:
                    thumbnails[key] = safe
        if gallery.get("selection"):
            selections[str(gallery["selection"])] = None
        for number, query in enumerate(gallery["queries"]):
            if not isinstance(query, dict) or not isinstance(query.get("models"), dict):
                raise InputError(f"{path} (query {number + 1}): expected an object with the key 'models'")
            _merge(query, owner, table, merged, extras, f"{path} (query {number + 1})")
    return Gallery(list(merged.values()), thumbnails, " ".join(selections), notices)


def _merge(
    stored: dict[str, Any],
    owner: Run | None,
    table: ScoreTable,
    merged: dict[tuple[str, str, str], Query],
    extras: dict[str, Entry],
    where: str,
) -> None:
    kind = "i2t" if stored.get("kind") == "i2t" else "t2i"
    text, key = str(stored.get("text", "")), str(stored.get("truth") or stored.get("image") or "")
    query = merged.setdefault((kind, text, key), Query(kind, text, key, str(stored.get("why", ""))))
    ranks = stored.get("ranks")
    ranks = ranks if isinstance(ranks, dict) else {}
    for name, rows in stored["models"].items():
        entry = _entry(str(name), owner, table, extras)
        if any(known is entry for known, _, _ in query.answers):
            continue  # the teacher stands in every run's gallery
        try:
            answers = [
                Answer(str(r.get("key", "")), str(r.get("text", "")), float(r.get("score", 0.0)), bool(r.get("hit")))
                for r in rows
            ]
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{where}, model {name}: not a list of answers: {error}") from error
        rank = ranks.get(name)
        query.answers.append((entry, answers, rank if isinstance(rank, int) else None))
    query.answers.sort(
        key=lambda item: table.entries.index(item[0]) if item[0] in table.entries else len(table.entries)
    )


def _entry(name: str, owner: Run | None, table: ScoreTable, extras: dict[str, Entry]) -> Entry:
    """The entry that a model of a gallery is; one of its own (kept in `extras`) when the report does not know it."""
    for entry in table.entries:
        for run in entry.runs:
            if entry.role == "teacher" and name in {"teacher", run.teacher, entry.label}:
                return entry
            known = {run.name, entry.label, run.method}
            if entry.role == "student" and (name in known or (owner is run and name == "student")):
                return entry
    if name not in extras:
        role = "teacher" if name == "teacher" else "student"
        highest = max([entry.colour for entry in [*table.students, *extras.values()]], default=0)
        colour = 0 if role == "teacher" else highest + 1
        extras[name] = Entry(name, role, name, [], colour)
    return extras[name]


def _ranks_of_images(models: Mapping[str, EncodedPairs], owner: Tensor) -> np.ndarray:
    """(models, M): the rank of the right image for each caption."""
    result = []
    for encoded in models.values():
        image, text, ranks = encoded.image.float(), encoded.text.float(), []
        for start in range(0, len(text), 1024):  # stripes: the whole score matrix may be large
            scores = text[start : start + 1024] @ image.T
            own = scores.gather(1, owner[start : start + 1024, None].to(scores.device))
            ranks.append(1 + (scores > own).sum(1).cpu())
        result.append(torch.cat(ranks).numpy())
    return np.stack(result)


def _ranks_of_texts(models: Mapping[str, EncodedPairs], owner: Tensor, images: int) -> np.ndarray:
    """(models, N): the rank of the best of an image's captions."""
    result = []
    for encoded in models.values():
        image, text, ranks = encoded.image.float(), encoded.text.float(), []
        for start in range(0, images, 256):
            scores = image[start : start + 256] @ text.T
            rows = torch.arange(start, start + len(scores))
            mine = owner[None, :] == rows[:, None]
            best = scores.masked_fill(~mine.to(scores.device), -2.0).amax(1, keepdim=True)
            ranks.append(1 + (scores > best).sum(1).cpu())
        result.append(torch.cat(ranks).numpy())
    return np.stack(result)


def _choose(ranks: np.ndarray, count: int, generator: np.random.Generator) -> list[tuple[int, str]]:
    """(index, why): the first half drawn at random, the rest where the models' ranks lie furthest apart."""
    total = ranks.shape[1]
    by_chance = count if len(ranks) == 1 else (count + 1) // 2
    drawn = [int(i) for i in generator.choice(total, size=min(by_chance, total), replace=False)]
    spread = np.log(ranks.max(0)) - np.log(ranks.min(0))
    order = [int(i) for i in np.argsort(-spread, kind="stable") if int(i) not in set(drawn)]
    return [(i, "drawn at random") for i in drawn] + [(i, "models disagree") for i in order[: count - len(drawn)]]


def _top(scores: Tensor, count: int) -> list[int]:
    return [int(i) for i in torch.argsort(scores, descending=True, stable=True)[:count]]


def _rank(scores: Tensor, right: Sequence[int]) -> int | None:
    """1 + how many score higher than the best right answer."""
    return int((scores > scores[list(right)].max()).sum()) + 1 if right else None


def _encode(image: Image.Image) -> tuple[str, int, int]:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # a fresh image: nothing of the original file (comments, profiles, positions) travels along
    Image.fromarray(np.asarray(small)).save(buffer, format="JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), small.width, small.height
