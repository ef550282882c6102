"""Small random models, and no network for any of these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from clipdistill.models import ClipModel, build_student, build_words_tokenizer
from tests.conftest import refuse_connections

CAPTIONS = ["A red dog runs.", "Two cats; one's asleep!", "the dog and the cat", "a red car"]


def tiny_architecture(**changes: Any) -> dict[str, Any]:
    """A two-layer CLIP of some 60 000 parameters at 32 pixels."""
    values: dict[str, Any] = {
        "embed_dim": 24,
        "quick_gelu": False,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2},
    }
    return values | changes


@pytest.fixture
def make_tiny() -> Callable[..., ClipModel]:
    """A function (seed=0, **changes) that builds a tiny model with a vocabulary of its own."""

    def make(seed: int = 0, **changes: Any) -> ClipModel:
        return build_student(tiny_architecture(**changes), seed=seed, tokenizer=build_words_tokenizer(CAPTIONS, 12))

    return make


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to connect fails the test, whatever the environment allows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuse_connections(monkeypatch)
