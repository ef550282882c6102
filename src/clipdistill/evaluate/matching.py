"""Which caption belongs to which picture: SugarCrepe (arXiv 2306.14610) and Winoground (arXiv 2204.03162).

SugarCrepe: a picture, its caption and a wrong one; accuracy is the share of items whose own caption scores higher.
Winoground: two pictures and two captions of the same words; text score: each picture prefers its caption; image score:
each caption prefers its picture; group score: both. Scores are cosines; captions that score the same stand in random
order, of which the exact expectation counts (a constant model gets 1/2, and 1/4, 1/4, 1/6).
"""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipdistill.data.captions import clean, require_legible
from clipdistill.data.files import (
    LARGEST_FILE,
    data_path,
    find_image_root,
    read_image_file,
    read_json,
    safe_relative,
    settings_of_name,
)
from clipdistill.data.images import MAX_PIXELS, decode
from clipdistill.data.pairs import images_fingerprint
from clipdistill.data.problems import BadSample, Problems
from clipdistill.embed.encode import Encoder
from clipdistill.errors import InputError
from clipdistill.evaluate.evaluate import SAMPLED, with_intervals
from clipdistill.evaluate.tiles import TIE_TOLERANCE
from clipdistill.runtime.files import once, text_lines
from clipdistill.statistics.protocol import Protocol, describe_transform, digest
from clipdistill.statistics.scores import Queries, Scores

SUBSETS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
"""SugarCrepe's files."""
_EXAMPLES = "examples.jsonl"
Array = NDArray[np.float64]


class PictureFiles:
    """Pictures read one by one for an Encoder: files below a folder, or members of a zip archive."""

    def __init__(self, name: str, root: Path, names: Sequence[str]) -> None:
        self.name, self._root, self._names = name, root, list(names)

    def __len__(self) -> int:
        return len(self._names)

    def key(self, i: int) -> str:
        """The picture's path below the folder."""
        return self._names[i]

    def fingerprint(self) -> str:
        """SHA-256 over some of them."""
        return images_fingerprint(len(self), SAMPLED, lambda i: self._bytes(self._names[i]), self.image)

    def image(self, i: int, at_least: int | None = None) -> Any:
        """The RGB picture. Raises BadSample."""
        try:
            return decode(self._bytes(self._names[i]), max_pixels=MAX_PIXELS, at_least=at_least)
        except BadSample as error:
            raise BadSample(error.reason, self.key(i)) from error

    def _bytes(self, name: str) -> bytes:
        if self._root.suffix != ".zip":
            return read_image_file(self._root / name)
        try:
            with zipfile.ZipFile(self._root) as archive:
                size = archive.getinfo(name).file_size
                if size > LARGEST_FILE:
                    raise BadSample(f"unreadable image file: {size} bytes, at most {LARGEST_FILE} are read")
                return archive.read(name)
        except BadSample:
            raise
        except Exception as error:  # zipfile raises almost any type on damaged archives
            raise BadSample(f"unreadable image file: {error}") from error


@dataclass
class MatchingSource:
    """Items of one or two pictures (rows of `pictures`) and two captions, the first of which is the first picture's."""

    name: str
    pictures: PictureFiles
    rows: list[tuple[int, ...]]
    captions: list[tuple[str, str]]
    problems: Problems = field(default_factory=Problems)

    def __len__(self) -> int:
        return len(self.rows)

    def measure(self, encoder: Encoder, model: str, fingerprint: str, intervals: bool) -> Scores:
        """The scores of one model, with results item by item; intervals are clustered by picture."""
        images, kept, problems = encoder.images(self.pictures)
        place = {row: k for k, row in enumerate(kept)}
        items = [k for k, rows in enumerate(self.rows) if all(row in place for row in rows)]
        if not items:
            raise InputError(f"{self.name}: no item whose pictures can be read")
        captions = [text for k in items for text in self.captions[k]]
        texts = encoder.texts(captions, f"captions of {self.name}").double().view(len(items), 2, -1)
        chosen = images.double()[
            torch.tensor([[place[row] for row in self.rows[k]] for k in items])
        ]  # (n, pictures, D)
        queries = judged((texts @ chosen.transpose(1, 2)).numpy())
        clusters = np.array([self.rows[k][0] for k in items])
        two = len(self.rows[0]) == 2
        protocol = Protocol(
            name="matching",
            task="matching",
            dataset=self.name,
            images=len({row for k in items for row in self.rows[k]}),
            captions=len(captions),
            captions_per_image="two for two pictures" if two else "one right, one wrong",
            transform=describe_transform(encoder.model.image),
            dtype=encoder.dtype,
            keys_sha256=digest([*captions, *(self.pictures.key(row) for k in items for row in self.rows[k])]),
            model_fingerprint=fingerprint,
            pictures_sha256=self.pictures.fingerprint(),
        )
        values = {metric: float(hits.mean()) for metric, hits in queries.items()}
        by_picture = dict.fromkeys(queries, clusters)
        scores = Scores(with_intervals(values, queries, by_picture, protocol, model, intervals))
        scores.queries[model, protocol.question()] = Queries(queries, by_picture)
        if problems:
            scores.notes.append(
                f"{self.name}: {len(self) - len(items)} of {len(self)} items were left out, their pictures cannot be "
                f"read (first: {problems[0][0]}, {problems[0][1]})"
            )
        if cut := encoder.truncated(captions):
            scores.notes.append(f"{self.name}: {cut} of {len(captions)} captions are too long for the {model}: cut")
        return scores


def judged(cosines: Array) -> dict[str, Array]:
    """Metric -> (n,) results of the items for cosines (n, 2 captions, 1 or 2 pictures); fractions only at ties."""
    if cosines.shape[2] == 1:
        return {"accuracy": _over_orders(cosines[:, :, 0], [(0, 1)])}
    flat = cosines.reshape(len(cosines), 4)  # caption 0 with pictures 0, 1, then caption 1
    text, image = [(0, 2), (3, 1)], [(0, 1), (3, 2)]
    wins = {"text_score": text, "image_score": image, "group_score": [*text, *image]}
    return {metric: _over_orders(flat, pairs) for metric, pairs in wins.items()}


def _over_orders(values: Array, pairs: Sequence[tuple[int, int]]) -> Array:
    """(n,) the share of the orders of tied columns in which the first of each pair is above the second."""
    orders = list(itertools.permutations(range(values.shape[1])))
    result = np.zeros(len(values))
    for order in orders:
        won = np.ones(len(values), dtype=bool)
        for better, worse in pairs:
            gap = values[:, better] - values[:, worse]
            won &= (gap > TIE_TOLERANCE) | ((np.abs(gap) <= TIE_TOLERANCE) & (order[better] > order[worse]))
        result += won
    return result / len(orders)


def open_matching(name: str) -> list[MatchingSource] | None:
    """The sets that a name stands for; None where it names none of this kind.

    SugarCrepe's folder (its seven files, each a set), one of the files, or Winoground's folder or examples.jsonl, with
    ?images=FOLDER where the pictures lie elsewhere (SugarCrepe's are COCO's val2017).
    """
    text, _, query = name.partition("?")
    path = data_path(text)
    if not path.exists():
        return None
    found: list[Path] = []
    if path.is_dir():
        places = (path, path / "data")
        found = [f for f in (p / f"{subset}.json" for p in places for subset in SUBSETS) if f.is_file()]
        found = found or [f for f in (p / _EXAMPLES for p in places) if f.is_file()][:1]
    elif path.name == _EXAMPLES or path.suffix == ".json":
        found = [path]
    opened = [source for file in found if (source := _opened(file, query, path)) is not None]
    return opened or None


def _opened(file: Path, query: str, asked: Path) -> MatchingSource | None:
    if file.name != _EXAMPLES and file.stem not in SUBSETS and not _looks_like_choices(file):
        return None
    settings = settings_of_name(query, ["images"], f"{asked}?{query}")
    read = _winoground if file.name == _EXAMPLES else _sugar_crepe
    return read(file, settings.get("images"))


def _looks_like_choices(file: Path) -> bool:
    with file.open("rb") as opened:
        return b'"negative_caption"' in opened.read(4096)


def _caption(entry: Any, key: str, place: str) -> str:
    text = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(text, str) or not (cleaned := clean(text)[0]):
        raise InputError(f"{place}: no text under '{key}'")
    require_legible(text, f"{place}, '{key}'")
    return cleaned


def _picture(entry: Any, key: str, place: str) -> str:
    name = safe_relative(entry.get(key)) if isinstance(entry, dict) else None
    if name is None:
        raise InputError(f"{place}: no file name under '{key}'")
    return name


def _sugar_crepe(file: Path, images: str | None) -> MatchingSource:
    content = read_json(file)
    items = list(content.items()) if isinstance(content, dict) else list(enumerate(content))
    rows: list[tuple[int, ...]] = []
    captions: list[tuple[str, str]] = []
    names: dict[str, int] = {}
    for number, entry in items:
        place = f"{file}, item {number}"
        name = _picture(entry, "filename", place)
        rows.append((names.setdefault(name, len(names)),))
        captions.append((_caption(entry, "caption", place), _caption(entry, "negative_caption", place)))
    if not rows:
        raise InputError(f"{file}: no item in it")
    title = f"sugar_crepe/{file.stem}"
    root = find_image_root(names, images, file)
    return MatchingSource(title, PictureFiles(title, root, list(names)), rows, captions)


def _winoground(file: Path, images: str | None) -> MatchingSource:
    rows: list[tuple[int, ...]] = []
    captions: list[tuple[str, str]] = []
    names: list[str] = []
    for number, line in enumerate(text_lines(file), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            entry = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not JSON ({error})") from error
        rows.append((len(names), len(names) + 1))
        names += [_picture(entry, f"image_{k}", place) for k in (0, 1)]
        captions.append((_caption(entry, "caption_0", place), _caption(entry, "caption_1", place)))
    if not rows:
        raise InputError(f"{file}: no item in it")
    root, names = _winoground_pictures(file, names, images)
    return MatchingSource("winoground", PictureFiles("winoground", root, names), rows, captions)


def _winoground_pictures(file: Path, names: list[str], images: str | None) -> tuple[Path, list[str]]:
    """(folder or images.zip, names in it): the file names the pictures without their ending, 'ex_0_img_0'."""
    archive = data_path(images) if images else file.parent / "images.zip"
    if archive.suffix == ".zip" and archive.is_file():
        try:
            with zipfile.ZipFile(archive) as opened:
                inside = {Path(member).stem: member for member in opened.namelist() if not member.endswith("/")}
        except Exception as error:  # zipfile raises almost any type on damaged archives
            raise InputError(f"{archive}: not readable as a zip archive ({error})") from error
        return archive, [inside.get(Path(name).stem, name) for name in names]
    endings = ("", ".png", ".jpg", ".jpeg", ".webp")
    for ending in endings:
        try:
            return find_image_root([name + ending for name in names], images, file), [name + ending for name in names]
        except InputError as error:
            if ending == endings[-1]:
                raise InputError(str(error).replace(f"{names[0]}{ending}", f"{names[0]}.png")) from None
    raise AssertionError("unreachable")
