"""Added captions from a file: JSON, JSON lines or Parquet, each giving a sample's key its list of captions."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clipdistill.data.captions import clean_all
from clipdistill.data.problems import Problems
from clipdistill.embed.prepare import sample_digest
from clipdistill.errors import InputError, first_line
from clipdistill.runtime.files import once, text_lines

_log = logging.getLogger("clipdistill")
_COLUMNS = ("captions", "caption", "synthetic", "text")


def read_synthetic(path: Path) -> dict[str, tuple[str, ...]]:
    """Captions by key, cleaned, empty ones left out.

    JSON: {"key": ["caption", ...], ...} or a list of objects; JSON lines: one object a line with `key` and `captions`
    (a list) or `caption`; Parquet: columns of these names. A key may come again: its captions add up.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file of captions")
    found: dict[str, list[str]] = {}
    problems = Problems()
    for key, captions in _entries(path):
        found.setdefault(key, []).extend(clean_all(captions, key, problems))
    if problems:
        _log.warning(problems.sentence(str(path)))
    return {key: tuple(captions) for key, captions in found.items() if captions}


def _entries(path: Path) -> Iterable[tuple[str, list[str]]]:
    if path.suffix.lower() in (".parquet", ".pq"):
        yield from _from_parquet(path)
        return
    lines = text_lines(path)
    try:
        values = json.loads("\n".join(lines), object_pairs_hook=once)
    except json.JSONDecodeError:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    value = json.loads(line, object_pairs_hook=once)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where}: not readable as JSON ({error})") from error
                yield _entry(value, where)
        return
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if isinstance(values, dict) and "key" not in values:
        for key, captions in values.items():
            yield key, _captions(captions, f"{path}, key '{key}'")
    else:
        for number, value in enumerate(values if isinstance(values, list) else [values], 1):
            yield _entry(value, f"{path}, entry {number}")


def _entry(value: Any, where: str) -> tuple[str, list[str]]:
    name = next((c for c in _COLUMNS if isinstance(value, dict) and c in value), None)
    if name is None or not isinstance(value.get("key"), str | int):
        raise InputError(f"{where}: expected an object with 'key' and 'captions'")
    return str(value["key"]), _captions(value[name], where)


def _captions(value: Any, where: str) -> list[str]:
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise InputError(f"{where}: expected a caption or a list of captions")
    return captions


def _from_parquet(path: Path) -> Iterable[tuple[str, list[str]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        name = next((c for c in _COLUMNS if c in names), None)
        if name is None or "key" not in names:
            raise InputError(f"{path}: expected the columns 'key' and 'captions', found {', '.join(names)}")
        rows = 0
        for batch in file.iter_batches(columns=["key", name]):
            rows += batch.num_rows
            for key, captions in zip(batch["key"].to_pylist(), batch[name].to_pylist()):
                yield _entry({"key": key, name: captions}, f"{path}, key '{key}'")
        if rows != file.metadata.num_rows:  # a damaged footer can lose a row group
            raise ValueError(f"it holds {rows} rows and says {file.metadata.num_rows}")
    except InputError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text that is not UTF-8
        raise InputError(f"{path}: not readable as Parquet ({first_line(error)})") from error


def matched(captions: Mapping[str, tuple[str, ...]], keys: list[str], path: Path) -> list[tuple[str, ...]]:
    """The captions of each key in order; raises InputError when some samples have none."""
    missing = [key for key in keys if key not in captions]
    if missing:
        raise InputError(
            f"{path}: no captions for {len(missing)} of {len(keys)} samples (the first is '{missing[0]}'): every "
            "sample needs at least one, under the key that `clipdistill cache` uses"
        )
    return [captions[key] for key in keys]


def synthetic_fingerprint(keys: Iterable[str], captions: Iterable[tuple[str, ...]]) -> str:
    """sha256 over (key, captions) in order."""
    digest = hashlib.sha256(b"clipdistill synthetic 1")
    for key, texts in zip(keys, captions):
        digest.update(sample_digest(key, texts))
    return digest.hexdigest()
