"""Captions cleaned before anything sees them: valid Unicode in NFC, no control characters, single spaces, never empty.

What was changed or dropped is counted in the source's `problems`, never silent.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from clipdistill.data.problems import Problems
from clipdistill.errors import InputError
from clipdistill.runtime.files import decoded

LONGEST = 2000
"""Characters kept of a caption, far more than any CLIP reads; byte-pair encoding of endless words takes minutes."""

EMPTY = "empty caption"
MISSING = "missing caption"
CONTROL = "control characters removed"
UNDECODABLE = "undecodable characters removed"
INVISIBLE = "caption of invisible characters"
CUT = "over-long caption cut"

# how tables written by pandas and databases spell "nothing here"; alone in a cell they are no caption
_NOTHING = frozenset({"nan", "NaN", "NAN", "-nan", "<NA>", "null", "NULL", "None", "#N/A"})

# letters and symbols by name that show nothing: fillers and the blank pattern of braille
_INVISIBLE = frozenset("\u115f\u1160\u2800\u3164\uffa0\u034f")
_SPACES = re.compile(r"\s+")
# surrogates (bytes that were no UTF-8), the replacement character and code points that are no characters
_UNDECODABLE = re.compile("[\ud800-\udfff\ufffd\ufdd0-\ufdef\ufffe\uffff]")
# control characters that are not white space; the byte order mark as well
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")


def clean(text: str | bytes) -> tuple[str, tuple[str, ...]]:
    """The cleaned caption ('' when nothing is left) and what had to be done to it. Cleaning twice changes nothing."""
    if isinstance(text, bytes):
        text = decoded(text)
    if text.isascii() and text.isprintable() and len(text) <= LONGEST:
        return " ".join(text.split()), ()
    notes = []
    head = text[: 4 * LONGEST]  # a caption of megabytes is not searched to its end
    kept = _UNDECODABLE.sub("", head)
    if len(kept) != len(head):
        notes.append(UNDECODABLE)
    printable = _CONTROL.sub("", kept)
    if len(printable) != len(kept):
        notes.append(CONTROL)
    result = _SPACES.sub(" ", unicodedata.normalize("NFC", printable)).strip()
    if result and all(unicodedata.category(c) == "Cf" or c.isspace() or c in _INVISIBLE for c in result):
        result = ""
        notes.append(INVISIBLE)
    if len(result) > LONGEST or len(text) > len(head):
        # a cut can leave a combination that NFC joins differently, or a space at the end
        result = unicodedata.normalize("NFC", result[:LONGEST]).strip()
        notes.append(CUT)
    return result, tuple(notes)


def require_legible(text: str, where: str) -> None:
    """Raise InputError where something of a text that is meant as it is (a class name, a query) would have to go."""
    if found := next((note for note in clean(text)[1] if note != CUT), None):
        found = "nothing but invisible characters" if found == INVISIBLE else found.removesuffix(" removed")
        raise InputError(f"{where}: {text[:60]!r} holds {found}: take them out")


def is_missing(value: object) -> bool:
    """Whether a table's cell holds no caption at all: nothing, a blank, a float NaN, or a word for it ("nan")."""
    if value is None or value == "" or value != value:
        return True
    return isinstance(value, str) and value.strip() in _NOTHING


def clean_all(values: Iterable[object], key: str, problems: Problems) -> list[str]:
    """The usable captions among `values` (str or bytes), in order; everything else is counted under `key`.

    One text stands for a list of itself.
    """
    usable = []
    for value in [values] if isinstance(values, str | bytes) else values:
        if not isinstance(value, str | bytes):
            problems.add(MISSING, key)
            continue
        caption, notes = clean(value)
        for note in notes:
            problems.add(note, key)
        if caption:
            usable.append(caption)
        else:
            problems.add(EMPTY, key)
    return usable
