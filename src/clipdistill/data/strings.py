"""Many strings in two flat arrays: shared by forked workers without copies, cheap to send to spawned ones."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator

import numpy as np


def valid_text(text: str) -> str:
    """`text` with what is no Unicode (bytes of file names that are not UTF-8) written out, as in 'caf\\udce9.jpg'."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text


class Strings:
    """An immutable sequence of str held as UTF-8 bytes (uint8) and n + 1 offsets (int64).

    File names that are not UTF-8 (str with surrogates) come back as they went in.
    """

    def __init__(self, buffer: np.ndarray, offsets: np.ndarray) -> None:
        self.buffer = buffer
        self.offsets = offsets

    @classmethod
    def pack(cls, texts: Iterable[str]) -> Strings:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(e) for e in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} of {len(self)} strings")
        return self.buffer[self.offsets[i] : self.offsets[i + 1]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        data = self.buffer.tobytes()
        bounds = self.offsets.tolist()
        return (data[a:b].decode("utf-8", "surrogatepass") for a, b in itertools.pairwise(bounds))

    def hash_into(self, digest: hashlib._Hash) -> None:
        """Feed lengths and contents to a hashlib object: equal only for equal sequences."""
        digest.update(np.diff(self.offsets).astype("<i8").tobytes())
        digest.update(self.buffer.tobytes())
