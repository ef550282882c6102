"""Data sets of the Hugging Face hub (`hf:owner/name`, `hf:owner/name:split`) and those saved to disk by `datasets`.

Needs the extra `hf`. Code that a data set brings along is never run (the library refuses it as well).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipdistill.data.captions import clean_all
from clipdistill.data.files import choose_splits, read_image_file
from clipdistill.data.formats.rows import CAPTION_NAMES, IMAGE_NAMES, Rows, guessed_column
from clipdistill.data.pairs import DataConfig, IndexedPairs, PairSource
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError, MissingExtraError

_log = logging.getLogger(__name__)


def _library(purpose: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "hf", purpose) from error
    return datasets


def open_hub(name: str, config: DataConfig, default_split: str | None) -> PairSource:
    """The pairs of a data set on the hub, or in its local cache. Raises InputError when it is in neither."""
    datasets = _library(f"data 'hf:{name}'")
    identity, _, split = name.partition(":")
    if identity.count("/") != 1 or not all(identity.split("/")):
        raise InputError(f"'hf:{name}' is not the name of a hub data set: write hf:owner/name or hf:owner/name:split")
    _log.warning(
        "hf:%s: asking the Hugging Face hub, which needs the network unless the data are cached here", identity
    )
    asked = config.split or split or None
    try:
        names = list(datasets.get_dataset_split_names(identity))
        chosen, label = choose_splits(asked, default_split, dict.fromkeys(names, 0), f"hf:{identity}")
        wanted = names if chosen is None else [n for n in names if n in chosen]
        parts = {n: datasets.load_dataset(identity, split=n) for n in wanted}
    except InputError:
        raise
    except Exception as error:  # the library raises its own, requests', httpx's and the hub's errors
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"'hf:{identity}' cannot be had: {reason}; without a network, only data sets cached here can be opened, "
            "or name a local folder"
        ) from error
    return _pairs(parts, f"{identity}{label}", config)


def open_saved(folder: Path, config: DataConfig, default_split: str | None) -> PairSource:
    """The pairs of a folder written by `save_to_disk`."""
    datasets = _library(f"data '{folder}'")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # any error type of arrow, json or the library itself
        raise InputError(f"'{folder}' is not a data set that the datasets library can load ({error})") from error
    if not isinstance(loaded, Mapping):
        if config.split not in (None, "all"):
            raise InputError(f"'{folder}' has no splits: leave split='{config.split}' out")
        return _pairs({"": loaded}, folder.resolve().name, config)
    counts = {name: len(part) for name, part in loaded.items()}
    chosen, label = choose_splits(config.split, default_split, counts, str(folder))
    parts = {name: part for name, part in loaded.items() if chosen is None or name in chosen}
    return _pairs(parts, f"{folder.resolve().name}{label}", config)


def _pairs(parts: Mapping[str, Any], name: str, config: DataConfig) -> PairSource:
    datasets = _library(f"data '{name}'")
    rows = Rows(Path(name), config)
    tables: list[tuple[Any, str]] = []
    places, keys, captions = [], [], []
    for split, part in parts.items():
        columns = list(part.column_names)
        image = guessed_column(config.image_column, "filepath", IMAGE_NAMES, columns, "image_column", name)
        caption = guessed_column(config.caption_column, "title", CAPTION_NAMES, columns, "caption_column", name)
        if isinstance(part.features[image], datasets.Image):
            part = part.cast_column(image, datasets.Image(decode=False))
        table = part.select_columns([image])
        for row, value in enumerate(part[caption][:]):
            key = f"{split}/{row}" if split else str(row)
            values = value if isinstance(value, list) else [value]
            texts = clean_all(rows.present(values, key, f"row {key}"), key, rows.problems)
            if not texts:
                rows.problems.add("image without caption", key, dropped=True)
                continue
            places.append((len(tables), row))
            keys.append(key)
            captions.append(texts)
        tables.append((table, image))
    rows.refuse_missing()
    if not keys:
        found = rows.problems.summary()
        raise InputError(f"{name}: no usable image-caption pair" + (f" ({found})" if found else ""))
    return HubPairs(name, tables, places, keys, captions, rows, config)


class HubPairs(IndexedPairs):
    """Pairs of a `datasets.Dataset`; keys are '<split>/<row>'."""

    def __init__(
        self,
        name: str,
        tables: list[tuple[Any, str]],
        places: list[tuple[int, int]],
        keys: list[str],
        captions: list[list[str]],
        rows: Rows,
        config: DataConfig,
    ) -> None:
        super().__init__(name, keys, captions, rows.problems, config.max_pixels)
        self._tables = tables
        self._places = places
        self._root = Path(config.image_root) if config.image_root else Path()

    def image_bytes(self, i: int) -> bytes:
        table, row = self._places[i]
        data, column = self._tables[table]
        value = data[row][column]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return read_image_file(self._root / value)
        raise BadSample("empty image file")
