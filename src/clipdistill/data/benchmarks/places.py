"""Where published sets lie: one folder a set in $CLIPDISTILL_DATA (else ~/.cache/clipdistill/datasets)."""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from clipdistill.data.files import is_there
from clipdistill.errors import InputError, nearest

_NAME = re.compile(r"(?P<name>(?:wds/)?[\w-]+(?:/[\w-]+)?)(?::(?P<split>\w[\w+]*))?")

_BROUGHT_BY_HAND = {
    "winoground": "examples.jsonl with images/ or images.zip",
    "sugarcrepe": "add_att.json ... swap_obj.json, with COCO's val2017 beside them or as ?images=FOLDER",
    "xm3600": "captions.jsonl and images/",
    "crossmodal": "captions.jsonl and images/",
    "xtd": "test_image_names.txt with its captions and pictures",
}
"""Published benchmarks whose files have no address to fetch them from: how their names begin, and what they are."""


@dataclass(frozen=True)
class Source:
    """Where a set comes from: a class of torchvision's or a data set of the hub; else the layout to put there.

    holds: what torchvision's layout is known by, below the folder; size, origin: for torchvision's, to be said before.
    """

    torchvision: str = ""
    holds: str = ""
    hub: str = ""
    size: str = ""
    origin: str = ""
    layout: str = ""


@functools.cache
def sources() -> dict[str, Source]:
    """The known classification sets by name."""
    table = json.loads(resources.files("clipdistill.data.benchmarks").joinpath("sources.json").read_text("utf-8"))
    return {
        name: Source(**{{"from": "origin"}.get(k, k): v for k, v in about.items()}) for name, about in table.items()
    }


def source_of(name: str) -> Source:
    """Where a set comes from; 'wds/cars' and the like are CLIP_benchmark's. Raises InputError for an unknown name."""
    if name.startswith("wds/"):
        return Source(hub=name.replace("/", "_", 1).replace("/", "-"))
    if name not in sources():
        more = "; CLIP_benchmark's sets are called wds/NAME (wds/cars, wds/vtab/dtd)"
        raise InputError(f"no set of the name '{name}' is known{nearest(name, sources())}{more}")
    return sources()[name]


def data_root() -> Path:
    """The folder of the fetched sets."""
    if own := os.environ.get("CLIPDISTILL_DATA"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipdistill" / "datasets"


def folder_of(name: str, root: Path | None = None) -> Path:
    """The folder of one set; 'wds/vtab/dtd' and 'wds/vtab-dtd' are one."""
    first, slash, rest = name.partition("/")
    return (root or data_root()) / first / rest.replace("/", "-") if slash else (root or data_root()) / first


def named(text: str) -> tuple[str, str | None] | None:
    """(name, split) of 'cifar10', 'cifar10:train', 'wds/cars', or of a folder of the data root; None of other names."""
    found = _NAME.fullmatch(text)
    if found is None:
        return None
    name = found["name"]
    is_known = name in sources() or name.startswith("wds/") or is_there(folder_of(name))
    return (name, found["split"]) if is_known else None


def absent(name: str) -> InputError:
    """What to say of a known set that is not there: the command that brings it, or the layout."""
    about, folder = source_of(name), folder_of(name)
    if about.layout:
        return InputError(f"{name} is not in '{folder}' and cannot be fetched: put there {about.layout}")
    elsewhere = f"{name}@FOLDER" if name in sources() else "the path of its folder"
    return InputError(
        f"{name} is not in '{folder}': bring it once with  clipdistill fetch {name}  or say where it lies: {elsewhere}"
    )


def published(path: Path) -> str:
    """What to bring of a published set that has no command to fetch it, or the known set of a like name."""
    plain = [re.sub(r"[^a-z0-9]", "", part.lower()) for part in path.parts]
    for start, files in _BROUGHT_BY_HAND.items():
        if any(part.startswith(start) for part in plain):
            return f" (it is given out by its authors: name the folder that holds {files})"
    hint = nearest(str(path), sources())
    return hint if "did you mean" in hint else ""
