"""Cleaning captions: field.md E2 rows 5, 6 and 8."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipdistill.data.captions import CONTROL, CUT, EMPTY, LONGEST, MISSING, UNDECODABLE, clean, clean_all, is_missing
from clipdistill.data.problems import Problems

ANY_TEXT = st.text(st.characters(codec=None), max_size=200)  # surrogates included


@pytest.mark.parametrize(
    ("given_text", "expected", "notes"),
    [
        ("  a dog\t runs \n", "a dog runs", ()),
        ("a\x00dog\x07", "adog", (CONTROL,)),
        ("cafe\u0301", "café", ()),
        (b"na\xefve", "nave", (UNDECODABLE,)),
        ("broken \ud83d half", "broken half", (UNDECODABLE,)),
        ("lost \ufffd letter", "lost letter", (UNDECODABLE,)),
        (
            "a family \U0001f468\u200d\U0001f469\u200d\U0001f467",
            "a family \U0001f468\u200d\U0001f469\u200d\U0001f467",
            (),
        ),
        ("\u05db\u05dc\u05d1 \u200fruns", "\u05db\u05dc\u05d1 \u200fruns", ()),
        ("wide\u3000space\u00a0here", "wide space here", ()),
        ("\ufeffmark", "mark", (CONTROL,)),
        ("   ", "", ()),
        ("\x00", "", (CONTROL,)),
    ],
)
def test_clean(given_text: str | bytes, expected: str, notes: tuple[str, ...]) -> None:
    assert clean(given_text) == (expected, notes)


def test_over_long_caption_is_cut_and_said() -> None:
    text, notes = clean("word " * 5000)
    assert len(text) <= LONGEST
    assert text.startswith("word word")
    assert notes == (CUT,)


@given(st.one_of(ANY_TEXT, st.binary(max_size=200)))
def test_row_8_any_text_becomes_valid_stable_text(value: str | bytes) -> None:
    text, _ = clean(value)
    text.encode("utf-8")
    assert text == unicodedata.normalize("NFC", text)
    assert text == " ".join(text.split())
    assert not any(unicodedata.category(c) == "Cc" for c in text)
    assert clean(text) == (text, ())


@given(ANY_TEXT)
def test_nothing_disappears_silently(value: str) -> None:
    text, notes = clean(value)
    wanted = "".join(unicodedata.normalize("NFC", value).split())
    if "".join(text.split()) != wanted:
        assert notes


@pytest.mark.parametrize("value", [None, "", math.nan, "nan", "NaN", " null ", "None", "<NA>"])
def test_what_counts_as_missing(value: object) -> None:
    assert is_missing(value)


@pytest.mark.parametrize("value", ["a nan bread", "none of them", "  ", "0"])
def test_what_does_not_count_as_missing(value: object) -> None:
    assert not is_missing(value)


def test_clean_all_counts_what_it_drops() -> None:
    problems = Problems()
    assert clean_all(["good", " ", None, 3.0, "a\x00b"], "key", problems) == ["good", "ab"]
    assert problems.counts == {EMPTY: 1, MISSING: 2, CONTROL: 1}
    assert ("key", EMPTY) in problems.rows
