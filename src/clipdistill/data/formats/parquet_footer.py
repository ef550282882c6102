"""What the footer of a Parquet file says of its row groups, read from its own bytes (Thrift's compact protocol).

pyarrow would say it too, but it ends the process where statistics are damaged, which nothing in Python can catch.
Without this, the cells are looked at themselves.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any


def row_groups(file: Path, columns: Collection[str]) -> list[tuple[int, list[int | None]]]:
    """The rows of each row group, and for those of `columns` (dotted paths) that it has, how many cells are null.

    None where the statistics do not say; [] for a footer that cannot be read. Raises OSError.
    """
    with file.open("rb") as opened:
        end = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, end - 8))
        opened.seek(max(0, end - 8 - int.from_bytes(opened.read(4), "little")))
        read, found = io.BytesIO(opened.read()).read, []
    try:
        # the numbers of fields in FileMetaData, RowGroup, ColumnMetaData, Statistics
        for group in _thrift(read, 12)[4]:
            about = [chunk[3] for chunk in group[1]]
            counts = [each.get(12, {}).get(3) for each in about if b".".join(each[3]).decode() in columns]
            found.append((int(group[3]), counts))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return []
    return found


def _thrift(read: Callable[[int], bytes], kind: int) -> Any:
    """The next value, of this kind; of a struct (12) a dict by the numbers of its fields."""
    if kind == 12:
        fields: dict[int, Any] = {}
        number = 0
        while head := read(1)[0]:
            number = number + (head >> 4) if head >> 4 else _thrift(read, 4)
            fields[number] = head & 15 == 1 if head & 15 < 3 else _thrift(read, head & 15)
        return fields
    if kind == 9:  # a list
        head = read(1)[0]
        return [_thrift(read, head & 15) for _ in range(head >> 4 if head < 240 else _whole(read))]
    if kind < 4 or kind == 7:  # a byte, or a float of eight
        return read(1 if kind < 4 else 8)[0 if kind < 4 else 7]
    number = _whole(read)
    if kind > 8:
        raise ValueError(f"no kind {kind}")
    return read(number) if kind == 8 else (number >> 1) ^ -(number & 1)


def _whole(read: Callable[[int], bytes]) -> int:
    """A whole number in groups of seven bits, the lowest first."""
    number = 0
    for shift in range(0, 70, 7):
        byte = read(1)[0]
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise ValueError("a number of more than 64 bits")
