"""Data sets of the Hugging Face hub (`hf:owner/name`, `hf:owner/name:split`) and those saved to disk by `datasets`.

Needs the extra `hf`. Code that a data set brings along is never run (the library refuses it as well).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.data.files import choose_splits, one_split, read_image_file, refuse_split
from clipdistill.data.formats import Place
from clipdistill.data.formats.rows import WITHOUT_IMAGE, Rows, find_columns
from clipdistill.data.pairs import DataConfig, IndexedPairs, PairSource
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError, needing

_log = logging.getLogger(__name__)


def _library(purpose: str) -> Any:
    with needing("datasets", "hf", purpose):
        import datasets
    return datasets


def open_hub(place: Place, config: DataConfig, default_split: str | None) -> PairSource:
    """The pairs of a data set on the hub, or in its local cache. Raises InputError when it is in neither."""
    name = place.removeprefix("hf:")
    datasets = _library(f"data 'hf:{name}'")
    identity, _, split = name.partition(":")
    if identity.count("/") != 1 or not all(identity.split("/")):
        raise InputError(f"'hf:{name}' is not the name of a hub data set: write hf:owner/name or hf:owner/name:split")
    _log.warning(
        "hf:%s: asking the Hugging Face hub, which needs the network unless the data are cached here", identity
    )
    asked = one_split(config.split, split, str(place))
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


def open_saved(place: Place, config: DataConfig, default_split: str | None) -> PairSource:
    """The pairs of a folder written by `save_to_disk`."""
    folder = place.path
    datasets = _library(f"data '{folder}'")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # any error type of arrow, json or the library itself
        raise InputError(f"'{folder}' is not a data set that the datasets library can load ({error})") from error
    if not isinstance(loaded, Mapping):
        refuse_split(config.split, folder)
        return _pairs({"": loaded}, folder.resolve().name, config)
    counts = {name: len(part) for name, part in loaded.items()}
    chosen, label = choose_splits(config.split, default_split, counts, str(folder))
    parts = {name: part for name, part in loaded.items() if chosen is None or name in chosen}
    return _pairs(parts, f"{folder.resolve().name}{label}", config)


def _pairs(parts: Mapping[str, Any], name: str, config: DataConfig) -> PairSource:
    datasets = _library(f"data '{name}'")
    rows = Rows(Path(name), config.model_copy(update={"split": None}))  # the split is chosen already
    tables: list[tuple[Any, str]] = []
    for split, part in parts.items():
        image, caption = find_columns(config, list(part.column_names), name)
        if isinstance(part.features[image], datasets.Image):
            part = part.cast_column(image, datasets.Image(decode=False))
        table = part.select_columns([image])
        without = _null_rows(table, image)
        for row, value in enumerate([None] * len(part) if caption is None else part[caption][:]):
            key = f"{split}/{row}" if split else str(row)
            if row in without:
                rows.problems.add(WITHOUT_IMAGE, key, dropped=True)
            else:
                rows.add_cell(key, value, None, f"row {key}", (len(tables), row))
        tables.append((table, image))
    _, keys, captions, places = rows.cells(None, has_splits=False)
    return HubPairs(name, tables, places, keys, captions, rows)


def _null_rows(table: Any, column: str) -> set[int]:
    """The rows without an image, told by the table's own marks: no image is read."""
    null = table.data.column(column).is_null().to_numpy()
    chosen = getattr(table, "_indices", None)  # of a shuffled or filtered set
    null = null if chosen is None else null[chosen.column(0).to_numpy()]
    return set(np.flatnonzero(null).tolist())


class HubPairs(IndexedPairs):
    """Pairs of a `datasets.Dataset`; keys are '<split>/<row>'."""

    def __init__(
        self,
        name: str,
        tables: list[tuple[Any, str]],
        places: list[tuple[int, ...]],
        keys: list[str],
        captions: list[list[str]],
        rows: Rows,
    ) -> None:
        """places: number of the table and row of each image."""
        super().__init__(name, keys, captions, rows.problems, rows.config.max_pixels)
        self._tables = tables
        self._places = places
        self._root = Path(rows.config.image_root or "")

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
