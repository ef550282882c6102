"""Tokenizers: captions to fixed-length rows of token ids, with the counts needed to report truncation.

Three kinds. "clip-bpe": the byte-pair vocabulary of CLIP (open_clip's SimpleTokenizer). "words": a small vocabulary of
whole words built from captions, stored with the model. "hf": a Hugging Face tokenizer, stored whole with the model.
Each is a plain dictionary in JSON and back without loss; each pickles as that dictionary, so data workers may be
spawned.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from clipdistill.errors import InputError, nearest, needing
from clipdistill.registry import describe

CLIP_CONTEXT_LENGTH = 77
_CACHE_LIMIT = 200_000  # captions remembered per process, about 300 bytes each
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]|_")
_CLEANINGS = ("lower", "whitespace", "canonicalize")


class Tokenizer(ABC):
    """Captions to ids: BOS, the caption, EOT, then padding; over-long captions are cut and keep their EOT.

    `context_length` is the width of the rows, `vocab_size` one more than the largest id.
    """

    kind: ClassVar[str]
    context_length: int
    vocab_size: int

    @abstractmethod
    def encode(self, caption: str) -> list[int]:
        """The ids of one caption, uncut and unpadded, start and end included."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description from which `tokenizer_from_dict` makes an equal tokenizer."""

    @abstractmethod
    def with_context_length(self, context_length: int) -> Tokenizer:
        """The same vocabulary with rows of another width."""

    def __call__(self, captions: str | Sequence[str]) -> torch.Tensor:
        """Token ids of `captions`: LongTensor (n, context_length); one string is one caption, as in open_clip."""
        captions = as_captions(captions)
        rows = np.full((len(captions), self.context_length), self._padding, dtype=np.int64)
        for row, caption in zip(rows, captions):
            ids = self._ids(caption)
            if len(ids) > self.context_length:
                row[:] = ids[: self.context_length]
                if self._keeps_end:
                    row[-1] = ids[-1]
            else:
                row[: len(ids)] = ids
        return torch.from_numpy(rows)

    def lengths(self, captions: str | Sequence[str]) -> list[int]:
        """Ids each caption needs before any cut, start and end included; above `context_length` means it is cut."""
        return [len(self._ids(caption)) for caption in as_captions(captions)]

    def knows(self, caption: str) -> bool:
        """Whether any part of `caption` is in the vocabulary; a row of unknown words means nothing to the model."""
        return bool({*self._ids(caption).tolist()} - {*self._ids("").tolist(), self._unknown})

    _unknown: int | None = None
    _padding: int = 0
    _keeps_end: bool = True  # whether a cut row ends with the end token, as every CLIP expects

    @functools.cached_property
    def _cache(self) -> dict[str, np.ndarray]:
        return {}

    def _ids(self, caption: str) -> np.ndarray:
        """`encode` with memory: every epoch sees the same captions again."""
        ids = self._cache.get(caption)
        if ids is None:
            ids = np.asarray(self.encode(caption), dtype=np.int32)
            if len(self._cache) < _CACHE_LIMIT:
                self._cache[caption] = ids
        return ids

    def forget(self, most: int) -> None:
        """Let go of the captions it remembers when they are more than `most`: a service meets ever new ones."""
        if len(self._cache) > most:
            self._cache.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return tokenizer_from_dict, (self.to_dict(),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.kind, self.context_length, self.vocab_size))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(context_length={self.context_length}, vocab_size={self.vocab_size})"


class ClipBpeTokenizer(Tokenizer):
    """CLIP's byte-pair vocabulary of 49 408 ids, as open_clip ships it. `clean` is open_clip's text cleaning."""

    kind = "clip-bpe"

    def __init__(self, context_length: int = CLIP_CONTEXT_LENGTH, clean: str = "lower") -> None:
        if clean not in _CLEANINGS:
            raise InputError(f"unknown text cleaning '{clean!s:.50}'{nearest(clean, _CLEANINGS)}")
        self.context_length = _checked_length(context_length)
        self.clean = clean
        self._bpe = _simple_tokenizer(clean)
        self.vocab_size = self._bpe.vocab_size

    def encode(self, caption: str) -> list[int]:
        """The ids of one caption, uncut, start and end included."""
        return [self._bpe.sot_token_id, *self._bpe.encode(caption), self._bpe.eot_token_id]

    def forget(self, most: int) -> None:
        """See Tokenizer; open_clip's remembers words, and its special tokens as themselves."""
        super().forget(most)
        if len(self._bpe.cache) > most:
            self._bpe.cache = {word: known for word, known in self._bpe.cache.items() if word == known}

    def to_dict(self) -> dict[str, Any]:
        """See Tokenizer."""
        return {"kind": self.kind, "context_length": self.context_length, "clean": self.clean}

    def with_context_length(self, context_length: int) -> ClipBpeTokenizer:
        """See Tokenizer."""
        return ClipBpeTokenizer(context_length, self.clean)


@functools.cache
def _simple_tokenizer(clean: str) -> Any:
    """One open_clip tokenizer per cleaning and process: building its merge table takes a while."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(clean=clean)


class WordsTokenizer(Tokenizer):
    """Lower-cased words and punctuation marks from a fixed list.

    Ids: 0 padding, 1 start, 2 unknown, 3... the words, last end.
    """

    kind = "words"
    START, UNKNOWN, FIRST_WORD = 1, 2, 3
    _unknown = UNKNOWN

    def __init__(self, words: Sequence[str], context_length: int) -> None:
        if len(set(words)) != len(words):
            repeated = next(word for word, count in Counter(words).items() if count > 1)
            raise InputError(f"the vocabulary lists the word {repeated!r:.100} more than once")
        if not words:
            raise InputError("the vocabulary is empty: build it from captions with build_words_tokenizer")
        self.words = tuple(words)
        self.context_length = _checked_length(context_length)
        self._index = {word: self.FIRST_WORD + i for i, word in enumerate(self.words)}
        self.end = self.FIRST_WORD + len(self.words)
        self.vocab_size = self.end + 1

    def encode(self, caption: str) -> list[int]:
        """The ids of one caption, uncut, start and end included."""
        index, unknown = self._index, self.UNKNOWN
        return [self.START, *(index.get(word, unknown) for word in split_words(caption)), self.end]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of one row of ids, without start, end and padding; unknown words read '?'."""
        words = (self._word(int(i)) for i in ids if int(i) not in (0, self.START, self.end))
        return " ".join(words)

    def _word(self, i: int) -> str:
        return "?" if i == self.UNKNOWN else self.words[i - self.FIRST_WORD]

    def to_dict(self) -> dict[str, Any]:
        """See Tokenizer."""
        return {"kind": self.kind, "context_length": self.context_length, "words": list(self.words)}

    def with_context_length(self, context_length: int) -> WordsTokenizer:
        """See Tokenizer."""
        return WordsTokenizer(self.words, context_length)


def split_words(caption: str) -> list[str]:
    """Lower-cased words and single punctuation marks of a caption, NFC-normalised ("A dog's red-hot ball!" has 7)."""
    return _WORD.findall(unicodedata.normalize("NFC", caption).lower())


def build_words_tokenizer(
    captions: Iterable[str], context_length: int | None = None, min_count: int = 1, max_size: int | None = None
) -> WordsTokenizer:
    """A "words" tokenizer of the words that occur at least `min_count` times, the `max_size` most frequent at most.

    `context_length` None: the longest caption with its start and end, at most 77. Equally frequent words are ordered
    alphabetically, so the vocabulary is a function of the set of captions and not of their order.
    """
    counts: Counter[str] = Counter()
    longest = 0
    for caption in [captions] if isinstance(captions, str) else captions:
        words = split_words(caption)
        counts.update(words)
        longest = max(longest, len(words) + 2)
    kept = sorted(
        (word for word, count in counts.items() if count >= min_count), key=lambda word: (-counts[word], word)
    )
    if not kept:
        raise InputError(
            f"no word occurs {min_count} times or more in the captions: lower min_count or give more captions"
        )
    return WordsTokenizer(kept[:max_size], context_length or min(longest, CLIP_CONTEXT_LENGTH))


class HuggingFaceTokenizer(Tokenizer):
    """A fast Hugging Face tokenizer (the content of a tokenizer.json), run by the `tokenizers` library.

    The ids equal those of transformers with truncation and padding to `context_length`. `padding` is the id that fills
    rows, `clean` open_clip's text cleaning before the tokenizer's own, `blank` an id replaced by 0 in the rows
    (open_clip's `strip_sep_token`).
    """

    kind = "hf"

    def __init__(
        self,
        definition: Mapping[str, Any],
        context_length: int,
        padding: int = 0,
        clean: str | None = None,
        blank: int | None = None,
    ) -> None:
        with needing("tokenizers", "hf", "this model's tokenizer"):
            import tokenizers
        if clean is not None and clean not in _CLEANINGS:
            raise InputError(f"unknown text cleaning '{clean!s:.50}'{nearest(clean, _CLEANINGS)}")
        # cutting and padding are done by __call__, the same for every kind
        self.definition = {**definition, "truncation": None, "padding": None}
        try:
            self._fast = tokenizers.Tokenizer.from_str(json.dumps(self.definition))
        except Exception as error:  # the library raises bare Exception for a malformed definition
            raise InputError(
                f"the tokenizer definition is not one that the tokenizers library reads ({error})"
            ) from error
        self.context_length = _checked_length(context_length)
        self.clean, self.blank = clean, blank
        self._padding = padding
        known = getattr(self._fast.model, "unk_token", None)
        self._unknown = None if known is None else self._fast.token_to_id(known)
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1
        try:
            empty = self._fast.encode("").ids
            self._keeps_end = bool(empty) and self._fast.encode("a").ids[-1] == empty[-1]
        except Exception as error:  # the library's own kind: its unknown token is not in the vocabulary, say
            raise InputError(f"the tokenizer cannot be used ({error}): its files do not fit together") from error

    @classmethod
    def from_transformers(
        cls, tokenizer: Any, context_length: int, clean: str | None = None, strip_sep_token: bool = False
    ) -> HuggingFaceTokenizer:
        """The same tokenizer as a fast one of transformers."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or getattr(tokenizer, "padding_side", "right") != "right":
            raise InputError(
                f"the tokenizer {type(tokenizer).__name__} cannot be stored: not a fast one that pads on the right"
            )
        blank = tokenizer.sep_token_id if strip_sep_token else None
        return cls(json.loads(backend.to_str()), context_length, tokenizer.pad_token_id or 0, clean, blank)

    def require_fits(self, vocab_size: int, where: str) -> None:
        """Raise InputError where an ordinary token's id is beyond the text tower's table; added ones may not occur."""
        token, largest = max(self._fast.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
        if largest >= vocab_size:
            raise InputError(
                f"{where}: the tokenizer gives {token!r:.50} the id {largest}, and the text tower knows {vocab_size}: "
                "one of the two is damaged, or they belong to different models"
            )

    def encode(self, caption: str) -> list[int]:
        """The ids of one caption, uncut, start and end included."""
        if self.clean is not None:
            from open_clip.tokenizer import get_clean_fn

            caption = get_clean_fn(self.clean)(caption)
        return list(self._fast.encode(caption).ids)

    def __call__(self, captions: str | Sequence[str]) -> torch.Tensor:
        """See Tokenizer."""
        rows = super().__call__(captions)
        return rows if self.blank is None else rows.masked_fill(rows == self.blank, 0)

    def to_dict(self) -> dict[str, Any]:
        """See Tokenizer."""
        return {
            "kind": self.kind,
            "context_length": self.context_length,
            "padding": self._padding,
            "clean": self.clean,
            "blank": self.blank,
            "definition": self.definition,
        }

    def with_context_length(self, context_length: int) -> HuggingFaceTokenizer:
        """See Tokenizer."""
        return HuggingFaceTokenizer(self.definition, context_length, self._padding, self.clean, self.blank)


class OwnTokenizer(Tokenizer):
    """Somebody else's tokenizer: `call` maps a list of captions to ids (n, L). It is its module's, and not saved."""

    kind = "own"

    def __init__(self, call: Callable[[list[str]], Any], where: str) -> None:
        self._call, self._where = call, where
        self.context_length = self(["a"]).shape[1]
        vocabulary = getattr(call, "vocab_size", 0)
        self.vocab_size = vocabulary if isinstance(vocabulary, int) else 0

    def __call__(self, captions: str | Sequence[str]) -> torch.Tensor:
        """See Tokenizer. Raises InputError for what are no ids."""
        captions = as_captions(captions)
        try:
            found = self._call(list(captions))
            ids = torch.as_tensor(found["input_ids"] if isinstance(found, Mapping) else found)
        except Exception as error:
            raise InputError(
                f"{self._where} failed for a list of {len(captions)} captions ({describe(error)})"
            ) from error
        if ids.ndim != 2 or len(ids) != len(captions) or ids.is_floating_point():
            raise InputError(
                f"{self._where} gave {tuple(ids.shape)} for {len(captions)} captions, expected ids ({len(captions)}, L)"
            )
        return ids.long()

    def encode(self, caption: str) -> list[int]:
        """The ids of one caption, without the repeated id that fills the row."""
        ids: list[int] = self([caption])[0].tolist()
        while len(ids) > 1 and ids[-1] == ids[-2]:
            ids.pop()
        return ids

    def to_dict(self) -> dict[str, Any]:
        """What tells it from others; it cannot be made from that."""
        name = f"{type(self._call).__module__}.{type(self._call).__qualname__}"
        return {"kind": self.kind, "class": name, "context_length": self.context_length, "vocab_size": self.vocab_size}

    def with_context_length(self, context_length: int) -> Tokenizer:
        """Not possible: the rows are as wide as its owner makes them."""
        raise InputError(f"{self._where}: its rows have {self.context_length} ids, and no other width can be asked for")

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnTokenizer, (self._call, self._where)


def unknown_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """Those of `texts` of which the tokenizer knows no part: whatever is answered to them means nothing."""
    return [text for text in dict.fromkeys(texts) if not tokenizer.knows(text)]


def as_captions(captions: str | Iterable[str]) -> list[str]:
    """A list of captions; a single string is one caption, and not one for each of its letters."""
    found = list(captions) if isinstance(captions, Iterable) and not isinstance(captions, str) else [captions]
    for i, caption in enumerate(found):
        if not isinstance(caption, str):
            raise InputError(f"caption {i} is {caption!r:.80}, expected a text")
    return found


def tokenizer_from_dict(values: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described. Raises InputError for anything else."""
    kinds = {"clip-bpe": ClipBpeTokenizer, "words": WordsTokenizer, "hf": HuggingFaceTokenizer}
    if not isinstance(values, Mapping) or "kind" not in values:
        raise InputError("the tokenizer's description is not a mapping with a 'kind'")
    settings = {key: value for key, value in values.items() if key != "kind"}
    kind = values["kind"]
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"unknown tokenizer kind {kind!r:.200}{nearest(str(kind), kinds)}")
    words = settings.get("words", [])
    if kind == "words" and not (isinstance(words, list | tuple) and all(isinstance(word, str) for word in words)):
        raise InputError("the tokenizer's 'words' are not a list of words")
    try:
        return kinds[kind](**settings)
    except (TypeError, AttributeError) as error:
        raise InputError(f"the description of the '{kind}' tokenizer does not fit: {error}") from error


def _checked_length(context_length: int) -> int:
    if not isinstance(context_length, int) or isinstance(context_length, bool) or not 3 <= context_length <= 8192:
        raise InputError(f"context_length must be a whole number from 3 to 8192, got {context_length!r:.200}")
    return context_length
