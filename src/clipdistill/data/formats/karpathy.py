"""Karpathy's JSON (Flickr8k, Flickr30k, COCO): images with a split and several sentences each, and a folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from clipdistill.data.captions import clean_all
from clipdistill.data.files import choose_splits, collect, find_image_root, safe_relative
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import Problems


def is_karpathy(content: Any) -> bool:
    """Whether a JSON document has Karpathy's form: images that carry their sentences."""
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        return False
    return any(isinstance(entry, dict) and "sentences" in entry for entry in content["images"][:100])


def open_karpathy(path: Path, content: Any, config: DataConfig, default_split: str | None) -> PairSource:
    """The pairs of the chosen splits ('train', 'train+restval', 'all'); keys are paths below the image folder."""
    problems = Problems()
    images = [entry for entry in content["images"] if isinstance(entry, dict)]
    if len(images) < len(content["images"]):
        problems.add("unreadable entry", str(path), times=len(content["images"]) - len(images))
    counts = Counter(str(entry["split"]) for entry in images if "split" in entry)
    chosen, label = choose_splits(config.split, default_split, counts, str(path))
    if chosen is not None:
        images = [entry for entry in images if str(entry.get("split")) in chosen]
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
        texts = [
            s.get("raw") if isinstance(s, dict) else None for s in (sentences if isinstance(sentences, list) else [])
        ]
        if name in entries:
            problems.add("image listed again", name)
        entries.setdefault(name, []).extend(clean_all(texts, name, problems))
    root = find_image_root(entries or ["(no image)"], config.image_root, path)
    return collect(f"{path.stem}{label}", entries.items(), root, problems, config.max_pixels, path)
