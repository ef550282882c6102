"""A tokenizer as one `tokenizer.json` of the `tokenizers` library: cleaning, cutting and padding included.

`Tokenizer.from_file("tokenizer.json").encode_batch(captions)` gives the rows of ids that the text tower expects. The
rules of Python's `str` and of ftfy (open_clip's cleaning) are spelt out as replacements. Two things cannot be: ftfy's
repair of wrongly decoded text ("cafÃ©"), and HTML entities that are neither named in HTML 4 nor common punctuation.
"""

from __future__ import annotations

import copy
import html.entities
import json
import string
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.models.tokenizers import ClipBpeTokenizer, HuggingFaceTokenizer, Tokenizer, WordsTokenizer

FILE = "tokenizer.json"

AWKWARD: tuple[str, ...] = tuple(json.loads(Path(__file__).with_name("awkward.json").read_text(encoding="utf-8")))
"""Texts on which an exported tokenizer must give the ids of the original."""


# what ftfy removes: control characters, byte-order marks, interlinear marks
_CONTROL = "[\\x00-\\x08\\x0e-\\x1f\\x7f\\u206a-\\u206f\\ufeff\\ufff9-\\ufffc]"


def tokenizer_json(tokenizer: Tokenizer, *, to_longest: bool = False) -> dict[str, Any]:
    """The content of tokenizer.json for a tokenizer of any kind, checked on the texts in AWKWARD.

    to_longest: rows as long as the longest of their batch, for a text tower of any length; else the whole context.
    Raises InputError where the library cannot express the tokenizer.
    """
    if isinstance(tokenizer, ClipBpeTokenizer):
        definition = _clip_bpe(tokenizer)
    elif isinstance(tokenizer, WordsTokenizer):
        definition = _words(tokenizer)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        definition = _hugging_face(tokenizer)
    else:
        raise InputError(f"a tokenizer of the kind '{tokenizer.kind}' has no form for the tokenizers library")
    definition["truncation"] = {
        "direction": "Right",
        "max_length": tokenizer.context_length,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    definition["padding"] = {
        "strategy": "BatchLongest" if to_longest else {"Fixed": tokenizer.context_length},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": tokenizer.to_dict().get("padding", 0),
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    wrong = differing(tokenizer, definition, AWKWARD)
    if wrong:
        raise InputError(
            f"the tokenizer ('{tokenizer.kind}') gives other ids in the tokenizers library, first for {wrong[0]!r:.60}"
        )
    return definition


def differing(tokenizer: Tokenizer, definition: dict[str, Any], texts: Sequence[str]) -> list[str]:
    """Those of `texts` for which tokenizer.json gives other ids than the tokenizer; the padding may be shorter."""
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_str(json.dumps(definition))
    padding = definition["padding"]["pad_id"]
    found = (encoding.ids for encoding in fast.encode_batch(list(texts)))
    return [
        text
        for text, ids, row in zip(texts, found, tokenizer(texts).tolist(), strict=True)
        if ids + [padding] * (len(row) - len(ids)) != row
    ]


def _definition(model: Any, normalizers: list[Any], split: str, ends: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    """A definition whose words are the matches of `split`, between a start and an end token."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
    from tokenizers.normalizers import Sequence as Chain

    fast = Tokenizer(model)
    fast.normalizer = Chain(normalizers)
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(split), "removed", invert=True)
    start, end = ends
    fast.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A {end[0]}", special_tokens=[start, end])
    return json.loads(fast.to_str())


def _words(tokenizer: WordsTokenizer) -> dict[str, Any]:
    from tokenizers import models, normalizers

    # no word can be called like these: brackets are words of their own
    start, unknown, end = ("<start>", tokenizer.START), ("<unknown>", tokenizer.UNKNOWN), ("<end>", tokenizer.end)
    vocabulary = {word: tokenizer.FIRST_WORD + i for i, word in enumerate(tokenizer.words)}
    model = models.WordLevel({"<pad>": 0, **dict((start, unknown)), **vocabulary, end[0]: end[1]}, unknown[0])
    # Python's \w counts no combining marks, its \s four separators that Unicode's has not
    letter = r"[\p{L}\p{N}]"
    split = rf"{letter}+(?:['’]{letter}+)*|[^\p{{L}}\p{{N}}_\s\x1c-\x1f]|_"
    return _definition(model, [normalizers.NFC(), *_lower()], split, (start, end))


def _clip_bpe(tokenizer: ClipBpeTokenizer) -> dict[str, Any]:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    bpe = tokenizer._bpe
    merges = sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.get)
    model = models.BPE(vocab=dict(bpe.encoder), merges=merges, end_of_word_suffix="</w>", fuse_unk=False)
    ends = (("<start_of_text>", bpe.sot_token_id), ("<end_of_text>", bpe.eot_token_id))
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    fast = Tokenizer.from_str(json.dumps(_definition(model, _cleaning(tokenizer.clean), split, ends)))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [fast.pre_tokenizer, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if tokenizer.clean != "canonicalize":  # which leaves no brackets to recognise them by
        fast.add_special_tokens([AddedToken(name, normalized=True, special=True) for name, _ in ends])
    return json.loads(fast.to_str())


def _hugging_face(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    definition = copy.deepcopy(tokenizer.definition)
    if tokenizer.clean is not None:
        from tokenizers.normalizers import Sequence as Chain

        cleaning = json.loads(Chain(_cleaning(tokenizer.clean)).__getstate__())["normalizers"]
        own = definition.get("normalizer")
        definition["normalizer"] = {"type": "Sequence", "normalizers": cleaning + ([own] if own else [])}
    if tokenizer.blank is not None:
        definition["post_processor"] = _blanked(definition.get("post_processor"), tokenizer.blank)
    return definition


def _blanked(processor: Any, blank: int) -> Any:
    """A post-processor that inserts 0 where it would insert the id `blank` (open_clip's strip_sep_token)."""
    if isinstance(processor, list):
        if len(processor) == 2 and isinstance(processor[0], str) and processor[1] == blank:
            return [processor[0], 0]  # "sep": ["[SEP]", 102]
        return [_blanked(part, blank) for part in processor]
    if isinstance(processor, dict):
        result = {key: _blanked(value, blank) for key, value in processor.items()}
        if processor.get("ids") == [blank]:  # of a template's special token
            result["ids"] = [0]
        return result
    return processor


def _lower() -> list[Any]:
    """Python's str.lower: a capital sigma at the end of a word becomes the final one."""
    from tokenizers import Regex, normalizers

    return [normalizers.Replace(Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς"), normalizers.Lowercase()]


def _cleaning(clean: str) -> list[Any]:
    """open_clip's text cleaning ('lower', 'whitespace', 'canonicalize') as a list of normalizers."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Replace(old, new) for old, new in _entities()]
    steps += [normalizers.Replace(Regex(f"[{old}]"), new) for old, new in _characters()]
    steps += [normalizers.Replace(Regex("\\x1b\\[[0-9;]*[a-zA-Z]"), "")]
    # white space that Python's split knows, before other control characters vanish
    steps += [normalizers.Replace(Regex("[\\s\\x85\\u2028\\u2029]+"), " "), normalizers.Replace(Regex(_CONTROL), "")]
    steps += [normalizers.NFC()]
    if clean == "canonicalize":
        steps.append(normalizers.Replace("_", " "))
        marks = "".join(f"\\{mark}" for mark in string.punctuation)
        steps.append(normalizers.Replace(Regex(f"[{marks}]"), ""))
    if clean in ("lower", "canonicalize"):
        steps += _lower()
    return [*steps, normalizers.Replace(Regex("\\s+"), " "), normalizers.Strip()]


def _entities() -> list[tuple[str, str]]:
    """HTML entities as (text, character): the named ones of HTML 4 and the common punctuation by number."""
    numbered = (34, 38, 39, 60, 62, 160, 8211, 8212, 8216, 8217, 8220, 8221, 8230)
    pairs = [("&amp;", "&"), ("&amp;", "&"), ("&#38;", "&")]  # twice: "&amp;amp;" is common in crawled captions
    pairs += [(f"&{name};", text) for name, text in html.entities.entitydefs.items() if name != "amp"]
    pairs += [(form, chr(n)) for n in numbered for form in (f"&#{n};", f"&#x{n:x};", f"&#x{n:X};", f"&#0{n};")]
    return [*dict.fromkeys(pairs), ("&apos;", "'")]


def _characters() -> list[tuple[str, str]]:
    """Sets of characters (as in a regular expression) and what ftfy makes of each: ligatures, widths, quotes."""
    ligatures = "ĲĳǱǲǳǄǅǆǇǈǉǊǋǌ\ufb00\ufb01\ufb02\ufb03\ufb04\ufb06"
    pairs = [(c, unicodedata.normalize("NFKC", c)) for c in ligatures]
    pairs += [("ŉ", "'n"), ("\ufb05", "ſt"), ("\u3000", " ")]
    for code in range(0xFF01, 0xFFF0):
        wide = chr(code)
        if (plain := unicodedata.normalize("NFKC", wide)) != wide:
            pairs.append((wide, plain))
    return [*pairs, ("\u02bc\u2018-\u201b", "'"), ("\u201c-\u201f", '"')]
