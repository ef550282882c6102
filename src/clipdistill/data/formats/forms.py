"""The built-in forms of pairs, told by a name or by what lies there; a form's reader is loaded when a set is of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipdistill.data.files import data_path, expand_braces
from clipdistill.data.formats import Format, Place
from clipdistill.registry import wing

OBJECT_PREFIX = "object:"
_ROOT = frozenset({"image_root"})
_COLUMNS = _ROOT | {"image_column", "caption_column"}
_NO_TABLE = (b"PAR1", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\3\4")


def _form(reader: str, matches: Callable[[Place], bool], settings: frozenset[str] = frozenset()) -> Format:
    """reader: "module:function", below clipdistill.data; where it is not installed, nothing is of its form."""

    def found() -> Any:
        return wing(f"clipdistill.data.{reader}")

    return Format(
        lambda place: matches(place) and found() is not None, lambda *arguments: found()(*arguments), settings
    )


def is_karpathy(content: Any) -> bool:
    """Whether a JSON document has Karpathy's form: images that carry their sentences."""
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        return False
    return any(isinstance(entry, dict) and "sentences" in entry for entry in content["images"][:100])


def is_coco(content: Any) -> bool:
    """Whether a JSON document has COCO's form: a list of images and a list of annotations."""
    return isinstance(content, dict) and all(isinstance(content.get(part), list) for part in ("images", "annotations"))


def shards_of(place: Place) -> list[Path]:
    """The tars that a name stands for: one, those of a folder, or those of a brace pattern; [] if it names none."""
    if place.is_folder:
        return place.with_ending(".tar")
    if place.there:
        from clipdistill.data.formats.tar_headers import looks_like_tar

        return [place.path] if looks_like_tar(place.head) else []
    return [data_path(name, place.path) for name in expand_braces(place)] if "{" in place else []


def tables_of(place: Place) -> list[Path]:
    """The Parquet files that a name stands for; [] where it names none, or a folder of which they only tell something.

    img2dataset's `files` output keeps a table of links NNNNN.parquet beside each folder NNNNN of photographs.
    """
    if place.head.startswith(b"PAR1"):
        return [place.path]
    found = place.with_ending(".parquet", ".pq")
    return [] if any(file.with_suffix("").is_dir() for file in found) else found


def is_table(place: Place) -> bool:
    """Whether the name is a file that holds text (every other kind of file is known by its first bytes)."""
    head = place.head
    if not head.strip() or head.startswith(_NO_TABLE):
        return False
    if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return False
    return place.path.suffix.lower() not in (".tar", ".json", ".jsonl", ".ndjson") and place.document is None


def _has_captions(place: Place) -> bool:
    return bool(place.images) and any(os.path.splitext(image)[0] in place.texts for image in place.images)  # noqa: PTH122


def _is_saved(place: Place) -> bool:
    return any(file.name in ("dataset_dict.json", "state.json") for file in place.files)


OBJECT = _form("objects:open_held", lambda place: place.startswith(OBJECT_PREFIX))
HUB = _form("formats.hub:open_hub", lambda name: name.startswith("hf:") and not name.startswith("hf://"), _COLUMNS)
SAVED = _form("formats.hub:open_saved", _is_saved, _COLUMNS)
TARS = _form("formats.tars:open_tars", lambda place: bool(shards_of(place)), frozenset({"caption_column"}))
PARQUET = _form("formats.parquet:open_parquet", lambda place: bool(tables_of(place)), _COLUMNS)
KARPATHY = _form("formats.documents:open_karpathy", lambda place: is_karpathy(place.document), _ROOT)
COCO = _form("formats.documents:open_coco", lambda place: is_coco(place.document), _ROOT)
TABLE = _form("formats.table:open_table", is_table, _COLUMNS | {"separator"})
FOLDER = _form("formats.folder:open_folder", _has_captions)
