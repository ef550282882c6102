"""Captions of the same pictures in several languages: Crossmodal-3600 and XTD, from the files they are given out in.

Crossmodal-3600 (arXiv 2205.12522): captions.jsonl, a picture a line ("image/key", then a language each with its list
"caption"), pictures as images/KEY.jpg. XTD (arXiv 2012.05107): test_image_names.txt and test_1kcaptions_LANGUAGE.txt,
line for line; its French and German (MIC/) and Japanese (STAIR/) lie in folders beside XTD10/ and are found there.
A language is named as a split is: captions.jsonl:de; an evaluation takes several, :de+en, or all.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from clipdistill.data.captions import clean_all
from clipdistill.data.files import collect, find_image_root, safe_relative
from clipdistill.data.formats import Format, Place
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import Problems
from clipdistill.errors import InputError, nearest
from clipdistill.runtime.files import once, text_lines

_NAMES = "test_image_names.txt"
_CAPTIONS = re.compile(r"test_1kcaptions_(\w+)\.txt")


def _captions_file(place: Place) -> Path | None:
    """Crossmodal-3600's file: the name itself, or captions.jsonl in the folder."""
    path = place.path / "captions.jsonl" if place.is_folder else place.path
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return None
    with path.open("rb") as file:
        return path if b'"image/key"' in file.read(1 << 16) else None


def _names_file(place: Place) -> Path | None:
    """XTD's list of pictures: in the folder, or in XTD10/ below it."""
    if not place.is_folder:
        return place.path if place.there and place.path.name == _NAMES else None
    return next((path for path in (place.path / _NAMES, place.path / "XTD10" / _NAMES) if path.is_file()), None)


def _matches(place: Place) -> bool:
    return bool(_captions_file(place) or _names_file(place))


def _caption_files(names: Path) -> dict[str, Path]:
    """Language -> XTD's file of captions."""
    folders = [names.parent, *(names.parent.parent / name for name in ("XTD10", "MIC", "STAIR"))]
    listed = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
    found = [(match[1], file) for file in listed if (match := _CAPTIONS.fullmatch(file.name))]
    return dict(sorted(dict(reversed(found)).items()))


def _lines(path: Path) -> list[str]:
    return text_lines(path, errors="surrogateescape")


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of Crossmodal-3600's file. Raises InputError that names a line which is none."""
    found = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("image/key"), str):
            raise InputError(f"{path}, line {number}: no object with an 'image/key'")
        found.append(record)
    return found


def _of_record(record: dict[str, Any]) -> list[str]:
    return [key for key, value in record.items() if isinstance(value, dict) and "caption" in value]


def _languages(place: Place) -> list[str]:
    if path := _captions_file(place):
        return list(dict.fromkeys(language for record in _records(path) for language in _of_record(record)))
    names = _names_file(place)
    return list(_caption_files(names)) if names else []


def languages(place: Place, split: str | None) -> list[str]:
    """The languages that `split` names ('de', 'de+en', 'de,en'), all of the set where it names none."""
    known = _languages(place)
    if not known:
        raise InputError(f"'{place}': no captions in any language beside the list of its pictures")
    if split in (None, "", "all"):
        return known
    asked = list(dict.fromkeys(re.split(r"[+,]", str(split))))
    unknown = next((name for name in asked if name not in known), None)
    if unknown is not None:
        raise InputError(f"'{place}' has no captions in '{unknown}'{nearest(unknown, known)}")
    return asked


def open_language(place: Place, config: DataConfig, default_split: str | None) -> PairSource:
    """The pictures with their captions in one language; keys are the pictures' names."""
    asked = languages(place, config.split)
    if len(asked) > 1:
        raise InputError(
            f"'{place}' has captions in {len(asked)} languages ({', '.join(asked[:12])}{', ...' * (len(asked) > 12)}): "
            f"name one, '{place}:{asked[0]}'; eval takes several"
        )
    language, problems = asked[0], Problems()
    if path := _captions_file(place):
        where, title = path, "crossmodal3600"
        entries = _of_crossmodal(path, language, problems)
    else:
        where = _names_file(place) or place.path
        title, entries = "xtd", _of_xtd(where, _caption_files(where)[language], problems)
    root = find_image_root([name for name, _ in entries] or ["(no image)"], config.image_root, where)
    return collect(f"{title}/{language}", entries, root, problems, config.max_pixels, where)


def _of_crossmodal(path: Path, language: str, problems: Problems) -> list[tuple[str, list[str]]]:
    entries: dict[str, list[str]] = {}
    for record in _records(path):
        name = safe_relative(f"{record['image/key']}.jpg")
        if name is None:
            problems.add("unusable image name", f"{record['image/key']!r:.100}", dropped=True)
        elif name in entries:
            problems.add("image listed again", name)
        else:
            own = record.get(language)
            captions = own.get("caption") if isinstance(own, dict) else None
            entries[name] = clean_all(captions if isinstance(captions, list) else [captions], name, problems)
    return list(entries.items())


def _of_xtd(names: Path, captions: Path, problems: Problems) -> list[tuple[str, list[str]]]:
    pictures, texts = ([line.strip() for line in _lines(path)] for path in (names, captions))
    for lines in (pictures, texts):
        while lines and not lines[-1]:
            lines.pop()
    if len(pictures) != len(texts):
        raise InputError(f"{captions}: {len(texts)} lines, and '{names}' names {len(pictures)} pictures")
    entries: dict[str, list[str]] = {}
    for number, (picture, text) in enumerate(zip(pictures, texts), start=1):
        name = safe_relative(picture)
        if name is None:
            problems.add("unusable image name", f"{names.name}, line {number}", dropped=True)
        else:
            entries.setdefault(name, []).extend(clean_all([text], name, problems))
    return list(entries.items())


FORMAT = Format(_matches, open_language, frozenset({"image_root"}), parts=languages)
