"""Tiny teachers and settings shared by the tests of the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipdistill.cache.config import CacheConfig
from clipdistill.cache.fill import fill
from clipdistill.cache.store import CacheStore
from clipdistill.config import build
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.models import ClipModel, build_student, save_model
from clipdistill.models.tokenizers import build_words_tokenizer


def scenes(size: int = 40) -> PairSource:
    """The first `size` scenes of the training split, five captions each."""
    return open_pairs(DataConfig(path="scenes:train", size=size))


def tiny_model(seed: int = 0, *, dim: int = 32, image_size: int = 32, words: int = 200) -> ClipModel:
    """A CLIP of a few thousand parameters with random weights."""
    source = scenes(60)
    captions = [caption for i in range(60) for caption in source.captions(i)]
    architecture = {
        "embed_dim": dim,
        "quick_gelu": False,
        "vision_cfg": {"image_size": image_size, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 512, "width": 64, "heads": 1, "layers": 1},
    }
    tokenizer = build_words_tokenizer(captions, 24, max_size=words)
    return build_student(architecture, seed=seed, tokenizer=tokenizer)


def saved_teacher(folder: Path, seed: int = 0, **settings: Any) -> str:
    """A tiny teacher as a model folder; returns its name."""
    save_model(tiny_model(seed, **settings), folder)
    return str(folder)


def cache_config(folder: Path, teacher: str, size: int = 40, **settings: Any) -> CacheConfig:
    """Settings for a cache in `folder` over `size` scenes, in blocks of 8."""
    values = {
        "teacher": teacher,
        "data": {"path": "scenes:train", "size": size},
        "out": folder,
        "block": 8,
        "batch_size": 6,
        "device": "cpu",
        **settings,
    }
    return build(CacheConfig, values)


def filled(folder: Path, teacher: str, size: int = 40, **settings: Any) -> CacheStore:
    """A filled cache."""
    return fill(cache_config(folder, teacher, size, **settings)).store


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store that must not depend on how it was filled."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "locks"
    }
