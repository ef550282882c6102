"""`clipdistill fetch`: bring published classification sets once, into a folder that is said before."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
from dataclasses import dataclass
from pathlib import Path

from clipdistill.arguments import checked
from clipdistill.data.benchmarks.places import Source, absent, data_root, folder_of, source_of, sources
from clipdistill.errors import InputError, listed
from clipdistill.runtime.console import Shown, file_size, say
from clipdistill.runtime.files import make_folder

_HUB = "clip-benchmark"
_USAGE = """
clipdistill fetch cifar10 caltech101
clipdistill fetch wds/cars wds/vtab/dtd --to /data/sets
clipdistill eval runs/x --data cifar10 --data caltech101 --data wds/cars
"""


@dataclass(frozen=True, repr=False)
class Fetched(Shown):
    """A set that `fetch` brought: its folder, the name by which `evaluate` and the others read it, files and bytes.

    It stands for its folder where a path is taken: `Path(fetched)`, `os.listdir(fetched)`.
    """

    folder: Path
    data: str
    files: int
    size: int

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        return f"{self.data}: {self.files:,} files, {file_size(self.size)}, in '{self.folder}'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Names, place, splits."""
    parser.epilog = _USAGE
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="a name of `list datasets`, or wds/NAME for a set of CLIP_benchmark")
    add("--to", type=Path, metavar="DIR", help="one folder a set below it (default: where the names are looked for)")
    add("--split", help="of the hub's sets: test, train, or test,train (default test)")


def run(arguments: argparse.Namespace) -> int:
    """Bring each set and say how it is called."""
    root = data_root() if arguments.to is None else arguments.to.expanduser()
    splits = None if arguments.split is None else listed(arguments.split, "--split")
    for name in arguments.names:  # unknown names before the first download
        _checked(name, splits)
    for name in arguments.names:
        fetched = fetch(name, root=root, splits=splits)
        say(f"{name}: in '{fetched.folder}', read with  --data {fetched.data}")
    return 0


@checked
def fetch(name: str, *, root: str | Path | None = None, splits: list[str] | None = None) -> Fetched:
    """Bring one published set; what is there already is not brought again.

    name: 'cifar10' and the others of `clipdistill list datasets`, or 'wds/NAME' for a set of CLIP_benchmark. root: the
    folder that holds a folder a set (None: $CLIPDISTILL_DATA, else ~/.cache/clipdistill/datasets). splits: of sets from
    the hub (None: test); torchvision's come whole. Source: torchvision's addresses, and huggingface.co/clip-benchmark.

    Returns a Fetched: folder, data (its name for `evaluate` and the others), files, size. Raises InputError for names
    that are unknown or cannot be fetched, and where the network or the server fails.
    """
    about = _checked(name, splits)
    folder = folder_of(name, None if root is None else Path(root).expanduser())
    make_folder(folder, "data sets")
    try:
        if about.hub:
            _from_hub(name, about.hub, folder, splits or ["test"])
        else:
            say(f"{name}: {about.size} from {about.origin}, by torchvision, into '{folder}'")
            _by_torchvision(name, about.torchvision, folder)
    finally:
        with contextlib.suppress(OSError):  # nothing came
            folder.rmdir()
    declared = f"{name}@" if name in sources() else ""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return Fetched(folder, name if folder == folder_of(name) else f"{declared}{folder}", len(sizes), sum(sizes))


def _checked(name: str, splits: list[str] | None) -> Source:
    about = source_of(name)
    if about.layout:
        raise absent(name)
    for split in splits or ():
        if not about.hub:
            raise InputError(f"the split '{split}' is for sets of the hub, and {name} comes whole: leave it out")
        if not re.fullmatch(r"\w+", split):
            raise InputError(f"'{split}' is no name of a split: write test, train, or test,train")
    return about


def _by_torchvision(name: str, title: str, folder: Path) -> None:
    from clipdistill.data.formats.labelled_libraries import TORCHVISION_SETS

    builder = getattr(importlib.import_module("torchvision.datasets"), title)
    settings = list(TORCHVISION_SETS[title][1].values())[-1]
    try:
        builder(folder, download=True, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{name}: torchvision could not bring it into '{folder}': {' '.join(str(error).split())[:200]}; the same "
            "command goes on or begins again"
        ) from error


def _from_hub(name: str, repository: str, folder: Path, splits: list[str]) -> None:
    import huggingface_hub

    wanted = ["*.txt", *(f"{split}/*" for split in splits)]
    say(f"{name}: {' and '.join(splits)} of huggingface.co/datasets/{_HUB}/{repository} into '{folder}'")
    try:
        huggingface_hub.snapshot_download(
            f"{_HUB}/{repository}", repo_type="dataset", local_dir=folder, allow_patterns=wanted
        )
    except Exception as error:  # the library raises many types for "not there" and "no network"
        raise InputError(
            f"{name}: the hub did not give {_HUB}/{repository}: {' '.join(str(error).split())[:200]}; the same command "
            "goes on where it stopped"
        ) from error
    missing = [split for split in splits if not (folder / split / "nshards.txt").is_file()]
    if missing:
        raise InputError(f"{name}: {_HUB}/{repository} has no split '{missing[0]}'")
