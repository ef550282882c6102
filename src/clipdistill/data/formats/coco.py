"""COCO captions JSON (`captions_train2017.json`): images and annotations in two lists, joined by image id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipdistill.data.captions import clean_all
from clipdistill.data.files import collect, find_image_root, safe_relative
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import Problems
from clipdistill.errors import InputError


def is_coco(content: Any) -> bool:
    """Whether a JSON document has COCO's form: a list of images and a list of annotations."""
    return isinstance(content, dict) and all(isinstance(content.get(part), list) for part in ("images", "annotations"))


def open_coco(path: Path, content: Any, config: DataConfig) -> PairSource:
    """The pairs of a captions file, in the order of its images; keys are file names. It has no splits."""
    if config.split not in (None, "all"):
        raise InputError(f"{path} has no splits, so split='{config.split}' cannot be chosen: leave the split out")
    annotations = content["annotations"]
    if annotations and not any(isinstance(a, dict) and "caption" in a for a in annotations):
        hint = " (it holds boxes: take the file captions_*.json)" if "instances" in path.name else ""
        raise InputError(f"{path}: its annotations have no 'caption'{hint}")
    problems = Problems()
    names: dict[Any, str] = {}
    entries: dict[str, list[str]] = {}
    for number, image in enumerate(content["images"]):
        name = safe_relative(image.get("file_name")) if isinstance(image, dict) else None
        identity = image.get("id") if isinstance(image, dict) else None
        if name is None or not isinstance(identity, int | str):
            problems.add("unusable image name", f"images[{number}]", dropped=True)
        elif identity in names or name in entries:
            problems.add("image listed again", name)
            names.setdefault(identity, name)
        else:
            names[identity] = name
            entries[name] = []
    for number, annotation in enumerate(annotations):
        identity = annotation.get("image_id") if isinstance(annotation, dict) else None
        name = names.get(identity) if isinstance(identity, int | str) else None
        if name is None:
            problems.add("caption of an unknown image", f"annotations[{number}]")
        else:
            entries[name].extend(clean_all([annotation.get("caption")], name, problems))
    root = find_image_root(entries or ["(no image)"], config.image_root, path)
    return collect(path.stem, entries.items(), root, problems, config.max_pixels, path)
