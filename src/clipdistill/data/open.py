"""From the name of a data set to its reader: by what the files hold, never by a part of their path.

Readers are entries of `registry.FORMATS` (pairs) and `registry.LABELLED_FORMATS` (classification sets), asked one after
the other whether a name is theirs; those that were registered from outside are asked first.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clipdistill.arguments import checked
from clipdistill.data.class_names import KNOWN_SETS
from clipdistill.data.files import IMAGE_SUFFIXES, data_path, is_remote, is_there, one_split
from clipdistill.data.formats import Format, Place
from clipdistill.data.images import MAX_PIXELS
from clipdistill.data.labelled import LabelledConfig, LabelledSource, Naming, read_class_file
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.errors import InputError, nearest
from clipdistill.registry import FORMATS, LABELLED_FORMATS, Registry, needed_wing, wing

_WITH_SPLIT = re.compile(r"(?P<path>.+):(?P<split>\w[\w+]*)$")
_OF_SOME = ("image_root", "image_column", "caption_column", "separator", "size", "seed")
"""Settings of DataConfig that only some formats can apply."""


@checked
def register_format(
    name: str, matches: Callable[[str], bool], open: Callable[[Any], Any], *, labelled: bool = False
) -> None:
    """Add a data format.

    name: of the format, for messages.
    matches: whether a data set's name (what was given as `data`) is of this format; asked before the built-in ones.
    open: from the DataConfig to the data: a PairSource, or any object that `as_pairs` takes. Its `split` is the
    asked one, or what a run takes where none is named ('train', 'val', 'test').
    labelled: the format is of classification sets; `open` returns a LabelledSource from a LabelledConfig.
    Raises InputError for a name that is taken.
    """

    def open_checked(place: Place, config: Any, default_split: str | None = None) -> Any:
        if labelled:
            source = open(config)
            if not isinstance(source, LabelledSource):
                raise InputError(f"its open returned {type(source).__name__}, not a LabelledSource")
            return source
        from clipdistill.data.objects import as_pairs

        return as_pairs(open(config.model_copy(update={"split": config.split or default_split})), name)

    (LABELLED_FORMATS if labelled else FORMATS).register(name, Format(matches, open_checked, None))


def open_pairs(data: str | DataConfig, *, split: str | None = None, default_split: str | None = None) -> PairSource:
    """Open image-caption pairs by name.

    `split` overrides the configuration's; it is an error where the data has no splits. `default_split` is what to
    take when nobody named a split and the data has several. Raises InputError with what is wrong and what to do.
    """
    config = DataConfig(path=data) if isinstance(data, str) else data
    if isinstance(data, str) and data.startswith("pipe:"):  # in a program, not in a file
        importlib.import_module("clipdistill.remote").allow_pipe(data)
    if split is not None:
        config = config.model_copy(update={"split": split})
    if config.sets:
        raise InputError("data.sets: several sets with weights are for training and caches: name one of them here")
    if not config.path.strip() or "\0" in config.path:
        raise InputError(f"{config.path!r} is not the name of a data set")
    for place, named in _readings(config):
        for name, format in _matching(FORMATS, place):
            _refuse_unused(name, format, named)
            with FORMATS.blaming(name):
                return format.open(place, named, default_split)
    raise InputError(_no_format(Place(config.path)))


def parts_of(name: str, split: str | None) -> list[tuple[str, str | None]]:
    """(name, split) of each set that an evaluation measures by itself: each language of captions in several."""
    for place, config in _readings(DataConfig(path=name, split=split)):
        for _, format in _matching(FORMATS, place):
            if format.parts is not None:
                return [(str(place), part) for part in format.parts(place, config.split)]
            return [(name, split)]
    return [(name, split)]


def open_training(config: DataConfig) -> PairSource:
    """What a training or a cache takes: pairs, and (data/mixture) pictures alone, texts alone, several sets."""
    if config.sets:
        return needed_wing("clipdistill.data.mixture.opening:open_sets", "data.sets is")(config)  # type: ignore[no-any-return]
    try:
        return open_pairs(config, default_split="train")
    except InputError as error:
        open_without_pairs = wing("clipdistill.data.mixture.opening:open_without_pairs")
        if open_without_pairs is None:
            raise
        return open_without_pairs(config, error)


def check_data_name(name: str) -> None:
    """Raise InputError when no format knows the name of pairs (a missing file); nothing is opened."""
    if not any(True for place, _ in _readings(DataConfig(path=name)) for _ in _matching(FORMATS, place)):
        raise InputError(_no_format(Place(name)))


def check_training(config: DataConfig) -> None:
    """Raise InputError for what `open_training` would find nothing by the name of; only what must be is opened."""
    if config.sets:
        needed_wing("clipdistill.data.mixture.opening:check_sets", "data.sets is")(config)
        return
    if not config.path.strip():
        raise InputError("data: neither a path nor sets are named")
    try:
        check_data_name(config.path)
    except InputError:
        open_bare = wing("clipdistill.data.mixture.pictures:open_bare")
        if open_bare is None or open_bare(config) is None:
            raise


def check_evaluated_name(name: str) -> None:
    """Raise InputError for the name of data to measure on where nothing of that name is there; nothing is opened."""
    name = _declared(name)[1]
    place = Place(name)
    if place.there or is_there(data_path(name.partition("?")[0])):
        return
    labelled = [format for _, format in _matching(LABELLED_FORMATS, place)]
    for format in labelled:
        if format.check is not None:
            format.check(place)
    if not labelled:
        check_data_name(name)


def _readings(config: DataConfig) -> Iterator[tuple[Place, DataConfig]]:
    """The name as it is; then, when nothing of that name is there, without a split behind a colon."""
    place = Place(config.path)
    yield place, config
    with_split = None if place.there else _WITH_SPLIT.match(config.path)
    if with_split and is_there(data_path(with_split["path"])):
        changes = {"path": with_split["path"], "split": one_split(config.split, with_split["split"], config.path)}
        yield Place(with_split["path"]), config.model_copy(update=changes)


def _matching(registry: Registry[Any], place: Place) -> Iterator[tuple[str, Format]]:
    """The formats that say that the name is theirs."""
    for name in sorted(registry.names(), key=lambda name: registry.origin(name) is None):
        with registry.blaming(name):
            matches = registry.get(name).matches(place)
        if matches:
            yield name, registry.get(name)


def _refuse_unused(name: str, format: Format, config: DataConfig) -> None:
    """Raise InputError for a setting that the format would not apply."""
    if format.settings is None:
        return
    for setting in _OF_SOME:
        value = getattr(config, setting)
        if setting not in format.settings and value != DataConfig.model_fields[setting].default:
            raise InputError(
                f"data.{setting}={value} is not applied to '{config.path}', which is read as {name}: leave it out"
            )


def _no_format(place: Place) -> str:
    """What to say of a name that no format claims."""
    path, name = place.path, str(place)
    if not place.there:
        if is_remote(name):
            return f"data '{name}': nothing of that name is there, or no folder can be listed there"
        folder = path.parent
        if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
            return f"data '{name}' cannot be read: this user may not look into the folder '{folder}'"
        published = wing("clipdistill.data.benchmarks.places:published")
        if "::" in name or any(sign in name for sign in "*?["):
            return f"data '{name}': name a folder, or shards as in cc3m/{{00000..00331}}.tar; several sets: data.sets"
        return f"data '{name}': no such file or folder{(published and published(path)) or _near(path)}"
    if place.is_folder:
        return _no_folder(place)
    if not path.is_file():
        return f"data '{path}' is neither a file nor a folder"
    if not place.head.strip():
        return f"data '{path}' is empty"
    if place.head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")):
        return f"data '{path}' is compressed: unpack it first (samples are read in any order)"
    if path.suffix.lower() == ".tar":
        return f"data '{path}' is not a tar archive: its first header is damaged"
    if place.document is not None or path.suffix.lower() == ".json":
        content = place.document
        held = f"a {type(content).__name__}"
        if isinstance(content, dict):
            held = f"the keys {', '.join(sorted(content)[:6])}"
        return (
            f"data '{path}' is JSON, but neither Karpathy's (images with sentences) nor COCO's captions (images and "
            f"annotations): it holds {held if content else 'nothing'}"
        )
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return f"data '{path}' is one picture: name the folder that holds it, or a list of pictures"
    if b"\0" in place.head:
        return f"data '{path}' is no text, since it holds NUL bytes (UTF-16 without its mark?): save it as UTF-8"
    return f"data '{path}' is in no known format (Karpathy or COCO JSON, CSV, TSV, Parquet, tar, or a folder of these)"


def _no_folder(place: Place) -> str:
    candidates = place.with_ending(".json", ".csv", ".tsv", ".parquet", ".pq")
    if candidates:
        return f"the folder '{place}' holds several things: name the file, for example '{candidates[0]}'"
    if place.images:
        return (
            f"the folder '{place}' holds {len(place.images)} images, but no .txt file with captions beside any of them"
        )
    return f"the folder '{place}' holds neither tars, Parquet files nor images with .txt captions"


def _near(path: Path) -> str:
    """A file with a similar name, if there is one."""
    try:
        hint = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    except OSError:
        return f" (the folder '{path.parent}' does not exist)"
    return hint if "did you mean" in hint else ""


def open_labelled(
    path: str | Path,
    *,
    classes: str | Path | None = None,
    names: Naming = "readable",
    split: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> LabelledSource:
    """Open a classification set by name.

    Args:
        path: a folder per class, .npz, .tar or a folder or brace pattern of tars; `imagenet-r@PATH` to say which known
            set lies there; `torchvision:CIFAR10@ROOT`, `hf:owner/name?split=test`, or `scenes:zeroshot`.
        classes: file with the class names: text, one a line in label order; or JSON: a list of names, a list of
            {"index", "name"}, or a mapping of folder name (or number) to name. None: found in or beside the data.
        names: "readable" turns stored labels into plain words ('apple_pie' -> 'apple pie', wnids -> ImageNet's curated
            names); "stored" takes them as they are (the rule of CLIP-RD's released evaluation). Names from `classes`
            are never changed.
        split: for sets that have several.
    Raises: InputError (nothing there, no class names, a label without a name, ...).
    """
    own = None if classes is None else read_class_file(data_path(str(classes)))
    known, text = _declared(str(path))
    place = Place(text)
    config = LabelledConfig(text, known, own, names if own is None else "stored", split, max_pixels)
    for name, format in _matching(LABELLED_FORMATS, place):
        with LABELLED_FORMATS.blaming(name):
            return format.open(place, config)
    if not place.there:
        raise InputError(f"labelled data '{text}': no such file or folder")
    raise InputError(
        f"labelled data '{text}': expected a folder per class, a numpy .npz archive or a tar with .cls members"
    )


def _declared(text: str) -> tuple[str | None, str]:
    """(known set, path) of 'imagenet-r@PATH'; (None, text) of anything else."""
    match = re.match(r"([\w-]+)@(.+)$", text)
    if match is None or is_remote(text) or is_there(Path(text)):
        return None, text
    if match[1] not in KNOWN_SETS:
        raise InputError(f"'{text}': unknown classification set '{match[1]}'{nearest(match[1], KNOWN_SETS)}")
    return match[1], match[2]


def is_labelled_name(name: str) -> bool:
    """Whether a data name means a classification set rather than image-caption pairs.

    True for the prefixes of open_labelled, .npz files, archives with .cls members, and folders of folders of images
    without caption files. `hf:` names are ambiguous: True only where a label column is named ('?label=fine_label').
    """
    if re.match(rf"(?:{'|'.join(KNOWN_SETS)})@", name):
        return True
    place = Place(name)
    try:
        return any(format.surely is None or format.surely(place) for _, format in _matching(LABELLED_FORMATS, place))
    except Exception:  # zipfile raises almost any type on damaged archives
        return False
