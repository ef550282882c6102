"""The page's tokenizer gives the ids of the tokenizers library, for every kind of tokenizer.json that it takes."""

from __future__ import annotations

import json
import random

import pytest

from clipdistill.models.tokenizers import ClipBpeTokenizer, HuggingFaceTokenizer, build_words_tokenizer
from tests.conftest import shared_folder

tokenizers = pytest.importorskip("tokenizers")

from clipdistill.export.tokenizer_json import AWKWARD, tokenizer_json  # noqa: E402

CODE = """
import { Tokenizer } from "./tokenizer.js";
const main = ({ definition, texts }) => {
  const tokenizer = new Tokenizer(definition);
  return [tokenizer.batch(texts), texts.map((text) => tokenizer.knows(text))];
};
"""
LETTERS = "aAbZtheréÉßsİıſ1½²_'’-.,!<>&;#@ \t\n\x85\u2028\ufeffé日犬中😀👩‍👩‍👧\u0301\u200bΣσςﬁ＜\ufffd\x00\x1f"


def random_texts(count: int) -> list[str]:
    dice = random.Random(0)
    parts = [*LETTERS, "the ", "don't", "we're", "photo", "&amp;", "<end_of_text>", "[SEP]", "running", "##ing", "A.Σ"]
    texts = ["".join(dice.choices(parts, k=dice.randrange(24))) for _ in range(count)]
    return [text for text in texts if ".Σ" not in text]


def expected(definition, texts):
    fast = tokenizers.Tokenizer.from_str(json.dumps(definition))
    return [encoding.ids for encoding in fast.encode_batch(texts)]


def same(node, definition, texts):
    found, _ = node(CODE, {"definition": definition, "texts": texts})
    assert len(found) == len(texts)
    wrong = [(t, a, b) for t, a, b in zip(texts, found, expected(definition, texts), strict=True) if a != b]
    assert wrong == [], wrong[0]


def trained(model, trainer, normalizer=None, pre_tokenizer=None, template=None):
    """A tokenizer of a kind, trained on a few sentences."""
    fast = tokenizers.Tokenizer(model)
    fast.normalizer, fast.pre_tokenizer = normalizer, pre_tokenizer
    sentences = ["the cats are running in the photo", "don't we're café naïve 1,000 dogs!", *AWKWARD] * 3
    fast.train_from_iterator(sentences, trainer)
    if template is not None:
        start, end = template
        ids = [(token, fast.token_to_id(token)) for token in template]
        fast.post_processor = tokenizers.processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    return json.loads(fast.to_str())


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
@pytest.mark.parametrize("to_longest", [True, False])
@pytest.mark.sampled(4)
def test_clip_bpe(node, clean, to_longest):
    texts = [*AWKWARD, *random_texts(60)]
    same(node, tokenizer_json(ClipBpeTokenizer(16 if to_longest else 77, clean), to_longest=to_longest), texts)


def test_words(node):
    tokenizer = build_words_tokenizer(AWKWARD[:12], 10)
    same(node, tokenizer_json(tokenizer), [*AWKWARD, *random_texts(400)])


def bert(lowercase, accents=None):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    return trained(
        tokenizers.models.WordPiece(unk_token="[UNK]"),
        tokenizers.trainers.WordPieceTrainer(vocab_size=400, special_tokens=special),
        tokenizers.normalizers.BertNormalizer(lowercase=lowercase, strip_accents=accents),
        tokenizers.pre_tokenizers.BertPreTokenizer(),
        ("[CLS]", "[SEP]"),
    )


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("accents", [None, True, False])
def test_word_pieces(node, lowercase, accents):
    tokenizer = HuggingFaceTokenizer(bert(lowercase, accents), 12)
    same(node, tokenizer_json(tokenizer, to_longest=True), [*AWKWARD, *random_texts(400)])


def test_word_pieces_behind_open_clips_cleaning(node):
    tokenizer = HuggingFaceTokenizer(bert(True), 12, clean="lower", blank=3)
    same(node, tokenizer_json(tokenizer), [*AWKWARD, *random_texts(200)])


def test_minilm(node):
    definition = json.loads((shared_folder("towers/minilm_l6") / "tokenizer.json").read_text())
    same(node, tokenizer_json(HuggingFaceTokenizer(definition, 64), to_longest=True), [*AWKWARD, *random_texts(400)])


@pytest.mark.parametrize("prefix", [True, False])
def test_byte_level_of_gpt2_and_roberta(node, prefix):
    definition = trained(
        tokenizers.models.BPE(),
        tokenizers.trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
        pre_tokenizer=tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix),
        template=("<s>", "</s>"),
    )
    same(node, tokenizer_json(HuggingFaceTokenizer(definition, 24)), [*AWKWARD, *random_texts(400)])


@pytest.mark.parametrize("behaviour", ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"])
def test_every_way_to_split(node, behaviour):
    steps = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\-]|[a-c]"), behaviour),
        tokenizers.pre_tokenizers.Digits(individual_digits=behaviour == "isolated"),
        tokenizers.pre_tokenizers.Punctuation(),
    ]
    definition = trained(
        tokenizers.models.BPE(unk_token="<u>", fuse_unk=behaviour == "isolated"),
        tokenizers.trainers.BpeTrainer(vocab_size=120, limit_alphabet=30, special_tokens=["<s>", "</s>", "<u>"]),
        tokenizers.normalizers.NFKC(),
        tokenizers.pre_tokenizers.Sequence(steps),
        ("<s>", "</s>"),
    )
    same(node, tokenizer_json(HuggingFaceTokenizer(definition, 24)), [*AWKWARD, *random_texts(300)])


def test_added_tokens(node):
    fast = tokenizers.Tokenizer.from_str(json.dumps(bert(True)))
    new = tokenizers.AddedToken
    fast.add_tokens(
        [new("photo", single_word=True), new(" dog", normalized=False), new("<x>", lstrip=True, rstrip=True)]
    )
    texts = ["a photo photos PHOTO", "the dog dogs", "a  <x>  b<x>", "<x>", "photo", "aphoto photo!", " dog dog"]
    same(node, tokenizer_json(HuggingFaceTokenizer(json.loads(fast.to_str()), 24)), [*texts, *AWKWARD])


def test_texts_without_a_known_word_are_known_as_such(node):
    tokenizer = build_words_tokenizer(["a red dog"], 10)
    texts = ["a dog", "zebra", "", "!!!", "zebra dog"]
    _, known = node(CODE, {"definition": tokenizer_json(tokenizer), "texts": texts})
    assert known == [tokenizer.knows(text) for text in texts] == [True, False, False, False, True]
