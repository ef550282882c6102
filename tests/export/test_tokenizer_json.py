"""tokenizer.json gives the ids of our tokenizers, padding and cuts included."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill.errors import InputError
from clipdistill.models.tokenizers import ClipBpeTokenizer, HuggingFaceTokenizer, WordsTokenizer, build_words_tokenizer

tokenizers = pytest.importorskip("tokenizers")

from clipdistill.export.tokenizer_json import AWKWARD, differing, tokenizer_json  # noqa: E402


def ids(definition, texts):
    return [e.ids for e in tokenizers.Tokenizer.from_str(json.dumps(definition)).encode_batch(list(texts))]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("clean", "length"), [("lower", 77), ("whitespace", 9), ("canonicalize", 9)])
def test_clip_bpe(clean, length):
    tokenizer = ClipBpeTokenizer(length, clean)
    found = ids(tokenizer_json(tokenizer), AWKWARD)
    assert found == tokenizer(AWKWARD).tolist()
    assert {len(row) for row in found} == {length}
    cut = found[AWKWARD.index(" ".join(["word"] * 76))]
    assert cut[-1] == max(cut) == 49407


def test_words():
    tokenizer = build_words_tokenizer(AWKWARD[:12], 10)
    found = ids(tokenizer_json(tokenizer), AWKWARD)
    assert found == tokenizer(AWKWARD).tolist()
    assert any(WordsTokenizer.UNKNOWN in row for row in found)
    assert any(row[-1] == tokenizer.end for row in found)
    assert any(row[-1] == 0 for row in found)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(alphabet="aAbZéÉßσİ1½_'’-.,!<>&;# \t\n日犬😀\u0301\u200b", max_size=24), min_size=1, max_size=8)
)
def test_words_on_any_text(texts):
    assert differing(WORDS, DEFINITION, texts) == []


def test_capital_sigma():
    # Python and Rust disagree on whether one behind a full stop or a mark ends a word (docs/deployment.md)
    assert differing(WORDS, DEFINITION, ["Σ", "AΣ", "ΣA", "A Σ", "AΣA", "ΣΣ", "A'Σ"]) == []
    assert differing(WORDS, DEFINITION, ["A.Σ"]) == ["A.Σ"]


WORDS = WordsTokenizer(["a", "b", "aab", "é", "ß", "σ", "1", "'", "’", "-", "_", "犬", "😀"], 12)
DEFINITION = tokenizer_json(WORDS)


@pytest.mark.parametrize(("clean", "blank"), [(None, None), ("lower", None), ("whitespace", 3)])
def test_hugging_face(clean, blank):
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "dog": 4, "a": 5, "Dog": 6, "word": 7}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = HuggingFaceTokenizer(json.loads(fast.to_str()), 8, padding=0, clean=clean, blank=blank)
    found = ids(tokenizer_json(tokenizer), [*AWKWARD, "a Dog"])
    assert found == tokenizer([*AWKWARD, "a Dog"]).tolist()
    assert found[-1] == [2, 5, 4 if clean == "lower" else 6, 0 if blank == 3 else 3, 0, 0, 0, 0]


def test_a_tokenizer_that_cannot_be_expressed_is_refused():
    """Two end tokens: cut rows keep the last one here, both in the library."""
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[A]": 1, "[B]": 2}, "[UNK]"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [A] [B]", special_tokens=[("[A]", 1), ("[B]", 2)]
    )
    with pytest.raises(InputError, match="gives other ids in the tokenizers library, first for"):
        tokenizer_json(HuggingFaceTokenizer(json.loads(fast.to_str()), 8))


def test_texts_with_other_ids_are_found():
    """Wrongly decoded text, which ftfy repairs and a tokenizer.json cannot."""
    tokenizer = ClipBpeTokenizer()
    assert differing(tokenizer, tokenizer_json(tokenizer), ["cafÃ© au lait", "a dog"]) == ["cafÃ© au lait"]
