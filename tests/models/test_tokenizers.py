"""Tokenizers: ids against hand-written ones and against the original libraries, cutting, counting, round trips."""

from __future__ import annotations

import json
import pickle
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill.errors import InputError
from clipdistill.models.tokenizers import (
    ClipBpeTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    WordsTokenizer,
    build_words_tokenizer,
    split_words,
    tokenizer_from_dict,
    unknown_texts,
)

CAPTIONS = ["A dog's red-hot ball!", "the dog", "", "a cat, a dog and a café", "über 3 dogs 🐕"]


def hugging_face(context_length: int = 8) -> HuggingFaceTokenizer:
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "a": 2, "dog": 3, "runs": 4, "[BOS]": 5, "[EOS]": 6}
    tokenizer = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 5), ("[EOS]", 6)])
    tokenizer.enable_truncation(4)
    return HuggingFaceTokenizer(json.loads(tokenizer.to_str()), context_length)


@pytest.fixture(params=["clip-bpe", "words", "hf"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "hf":
        return hugging_face()
    return ClipBpeTokenizer(8) if request.param == "clip-bpe" else build_words_tokenizer(CAPTIONS, 8)


def test_clip_bpe_equals_open_clip_and_openai_ids() -> None:
    ours = ClipBpeTokenizer()(CAPTIONS)
    assert torch.equal(ours, open_clip.get_tokenizer("ViT-B-32")(CAPTIONS))
    assert ClipBpeTokenizer().encode("a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_words_ids_are_the_documented_ones() -> None:
    tokenizer = WordsTokenizer(["dog", "a", "red"], 6)
    assert tokenizer(["A red dog", "a blue DOG"]).tolist() == [[1, 4, 5, 3, 6, 0], [1, 4, 2, 3, 6, 0]]
    assert tokenizer.vocab_size == 7
    assert tokenizer.decode(tokenizer(["a blue dog"])[0].tolist()) == "a ? dog"


def test_words_are_split_at_punctuation_and_normalised() -> None:
    assert split_words("A dog's red-hot ball!") == ["a", "dog's", "red", "-", "hot", "ball", "!"]
    assert split_words("cafe\u0301") == split_words("café") == ["café"]
    assert split_words("x_y 3,5") == ["x", "_", "y", "3", ",", "5"]


def test_vocabulary_is_by_frequency_then_alphabet_and_ignores_caption_order() -> None:
    captions = ["b b c", "a c", "d"]
    built = build_words_tokenizer(captions)
    assert built.words == ("b", "c", "a", "d")
    assert built.context_length == 5
    assert build_words_tokenizer(reversed(captions)) == built
    assert build_words_tokenizer(captions, min_count=2).words == ("b", "c")
    assert build_words_tokenizer(captions, max_size=3).words == ("b", "c", "a")


def test_cut_rows_keep_their_end_and_lengths_count_what_was_needed(tokenizer: Tokenizer) -> None:
    long = "a dog runs a dog runs a dog runs"
    row = tokenizer([long])[0]
    end = tokenizer.encode(long)[-1]
    assert row.shape == (8,)
    assert row[-1] == end
    assert row[:-1].tolist() == tokenizer.encode(long)[:7]
    assert tokenizer.lengths([long, ""]) == [11, 2]


def test_end_is_the_largest_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a dog")[-1] == tokenizer.vocab_size - 1
    assert tokenizer(["a dog"]).argmax(dim=1).tolist() == [3]


def test_dictionary_and_pickle_round_trip(tokenizer: Tokenizer) -> None:
    through_json = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert through_json.to_dict() == tokenizer.to_dict()
    assert through_json == tokenizer
    tokenizer(CAPTIONS)  # fills the memory, which must not travel
    pickled = pickle.dumps(tokenizer)
    assert torch.equal(pickle.loads(pickled)(CAPTIONS), tokenizer(CAPTIONS))
    assert len(pickled) < 5_000


def test_other_context_length_keeps_the_vocabulary(tokenizer: Tokenizer) -> None:
    wider = tokenizer.with_context_length(20)
    assert wider(["a dog"]).shape == (1, 20)
    assert wider.encode("a dog runs") == tokenizer.encode("a dog runs")


def test_repeated_captions_give_equal_rows(tokenizer: Tokenizer) -> None:
    rows = tokenizer(["a dog", "runs", "a dog"])
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows, tokenizer(["a dog", "runs", "a dog"]))


def test_hugging_face_padding_and_cleaning_follow_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    definition = hugging_face().definition
    import tokenizers

    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(definition)), pad_token="[PAD]", eos_token="[EOS]"
    )
    captions = ["a dog", "a dog runs a dog runs a dog", "dog zebra"]
    theirs = fast(captions, padding="max_length", truncation=True, max_length=6, return_tensors="pt").input_ids
    ours = HuggingFaceTokenizer.from_transformers(fast, 6)
    assert torch.equal(ours(captions), theirs)
    assert ours.with_context_length(4)(["  a   dog "]).tolist() == [[5, 2, 3, 6]]
    cleaned = HuggingFaceTokenizer(definition, 6, clean="canonicalize")
    assert cleaned(["A dog."]).tolist() == [[5, 2, 3, 6, 0, 0]]
    blanked = HuggingFaceTokenizer(definition, 6, blank=6)
    assert blanked(["a dog"]).tolist() == [[5, 2, 3, 0, 0, 0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no? ?mapping|kind"),
        ({"kind": "wordz"}, "did you mean 'words'"),
        ({"kind": {"words": 1}}, "unknown tokenizer kind"),
        ({"kind": "words", "words": ["a", "a"], "context_length": 5}, "more than once"),
        ({"kind": "words", "words": [1], "context_length": 5}, "list of words"),
        ({"kind": "words", "words": ["a"], "context_length": -1}, "context_length"),
        ({"kind": "words", "words": ["a"], "context_length": 5, "extra": 1}, "does not fit"),
        ({"kind": "clip-bpe", "context_length": 77, "clean": "lowr"}, "did you mean 'lower'"),
        (
            {"kind": "hf", "definition": {"model": "nonsense"}, "context_length": 5},
            "not one that the tokenizers library",
        ),
        ({"kind": "hf", "definition": 3, "context_length": 5}, "does not fit"),
    ],
)
def test_wrong_descriptions_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenizer_from_dict(values)


def test_captions_without_frequent_words_are_refused() -> None:
    with pytest.raises(InputError, match="no word occurs 5 times"):
        build_words_tokenizer(["a dog"], min_count=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_any_text_gives_valid_rows(captions: list[str]) -> None:
    for tokenizer in (ClipBpeTokenizer(10), build_words_tokenizer(["a dog"], 10)):
        rows = tokenizer(captions)
        assert rows.shape == (len(captions), 10)
        assert 0 <= int(rows.min()) <= int(rows.max()) == tokenizer.vocab_size - 1
        assert all(length >= 2 for length in tokenizer.lengths(captions))


def test_one_string_is_one_caption(tokenizer: Tokenizer) -> None:
    assert torch.equal(tokenizer("a dog"), tokenizer(["a dog"]))
    assert tokenizer("a dog").shape == (1, 8)
    assert tokenizer.lengths("a dog") == tokenizer.lengths(["a dog"])
    assert tokenizer([]).shape == (0, 8)


def test_texts_without_a_known_word_are_found(tokenizer: Tokenizer) -> None:
    known = ["a dog", "runs dog"] if tokenizer.kind == "hf" else ["a dog", "the dog"]
    assert unknown_texts(tokenizer, ["", *known]) == [""]
    if tokenizer.kind != "clip-bpe":
        assert unknown_texts(tokenizer, ["zebra", "a zebra", "zebra unicorn"]) == ["zebra", "zebra unicorn"]
