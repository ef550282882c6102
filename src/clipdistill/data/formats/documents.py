"""Captions in one JSON document beside the images: Karpathy's form (Flickr8k, Flickr30k, COCO) and COCO's own.

Karpathy's: images with a split and several sentences each. COCO's (`captions_train2017.json`): images and annotations
in two lists, joined by image id.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from clipdistill.data.captions import clean_all, is_missing
from clipdistill.data.files import choose_splits, collect, find_image_root, refuse_split, safe_relative
from clipdistill.data.formats import Place
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import Problems
from clipdistill.errors import InputError


def open_karpathy(place: Place, config: DataConfig, default_split: str | None) -> PairSource:
    """The pairs of the chosen splits ('train', 'train+restval', 'all'); keys are paths below the image folder."""
    path, content, problems = place.path, place.document, Problems()
    images = [entry for entry in content["images"] if isinstance(entry, dict)]
    if len(images) < len(content["images"]):
        problems.add("unreadable entry", str(path), times=len(content["images"]) - len(images))
    splits = ["" if is_missing(entry.get("split")) else str(entry["split"]) for entry in images]
    chosen, label = choose_splits(config.split, default_split, Counter(splits), str(path), problems)
    if chosen is not None:
        images = [entry for entry, split in zip(images, splits) if split in chosen]
    entries: dict[str, list[str]] = {}
    for number, entry in enumerate(images):
        name = safe_relative(entry.get("filename"))
        folder = entry.get("filepath") or ""
        if folder and name:
            name = safe_relative(f"{folder}/{name}")
        if name is None:
            problems.add("unusable image name", f"images[{number}]: {entry.get('filename')!r:.100}", dropped=True)
            continue
        sentences = entry.get("sentences")
        texts = [s.get("raw") if isinstance(s, dict) else s for s in _listed(sentences)]
        if name in entries:
            problems.add("image listed again", name)
        entries.setdefault(name, []).extend(clean_all(texts, name, problems))
    root = find_image_root(entries or ["(no image)"], config.image_root, path)
    return collect(f"{path.stem}{label}", entries.items(), root, problems, config.max_pixels, path)


def _listed(value: Any) -> list[Any]:
    """A list as it is, one text as a list of itself, anything else as nothing."""
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []


def open_coco(place: Place, config: DataConfig, default_split: str | None) -> PairSource:
    """The pairs of a captions file, in the order of its images; keys are file names. It has no splits."""
    path, content, problems = place.path, place.document, Problems()
    refuse_split(config.split, path)
    annotations = content["annotations"]
    if annotations and not any(isinstance(a, dict) and "caption" in a for a in annotations):
        hint = " (it holds boxes: take the file captions_*.json)" if "instances" in path.name else ""
        raise InputError(f"{path}: its annotations have no 'caption'{hint}")
    names: dict[Any, str | None] = {}  # None: an id of several files
    entries: dict[str, list[str]] = {}
    for number, image in enumerate(content["images"]):
        name = safe_relative(image.get("file_name")) if isinstance(image, dict) else None
        identity = image.get("id") if isinstance(image, dict) else None
        if name is None or not isinstance(identity, int | float | str):
            problems.add("unusable image name", f"images[{number}]", dropped=True)
        elif (first := names.get(identity, name)) != name:  # whose its captions are cannot be told
            problems.add("image id of several files", name, dropped=True)
            if first is not None and entries.pop(first, None) is not None:
                problems.add("image id of several files", first, dropped=True)
            names[identity] = None
        elif name in entries:
            problems.add("image listed again", name)
            names.setdefault(identity, name)
        else:
            names[identity] = name
            entries[name] = []
    for number, annotation in enumerate(annotations):
        identity = annotation.get("image_id") if isinstance(annotation, dict) else None
        name = names.get(identity) if isinstance(identity, int | float | str) else None
        if name not in entries:
            problems.add("caption of an unknown image", f"annotations[{number}]")
        else:
            entries[name].extend(clean_all(_listed(annotation.get("caption")) or [None], name, problems))
    root = find_image_root(entries or ["(no image)"], config.image_root, path)
    return collect(path.stem, entries.items(), root, problems, config.max_pixels, path)
