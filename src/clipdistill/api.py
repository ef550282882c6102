"""What the command line does, as functions: cache, embed (others lie in their own rooms). Results show their numbers.

The packages of these names can be called and are these functions (registry.callable_package).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from clipdistill.config import build
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel

if TYPE_CHECKING:
    from clipdistill.cache.fill import FillReport
    from clipdistill.embed.encode import EncodedPairs


def cache(
    teacher: str | Sequence[str],
    data: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    split: str | None = None,
    views: int = 0,
    captions: Literal["all", "first"] = "all",
    dtype: Literal["fp16", "bf16", "int8"] = "fp16",
    batch_size: int = 64,
    device: str | None = None,
    engine: str = "torch",
    quiet: bool = False,
    **settings: Any,
) -> FillReport:
    """Compute a teacher's embeddings of `data` once, in the folder `out`; called again, it goes on where it stopped.

    teacher: a model's name, or several for an ensemble; then `teacher="cache:OUT"` stands for it in `distill`.
    data: a name, or a mapping of the settings of `data` with its path; split: of data that has splits (None: train).
    views: augmented views stored beside the evaluation view.
    captions: of each image; dtype: of the stored rows; batch_size: pictures a forward pass; device: None is CUDA where
    there is one; engine: what runs the teacher (`embed/names.py`: ENGINES; ray: on a Ray cluster); quiet: no lines on
    the error stream; settings: the others of docs/settings.md, for example block=1024.

    Returns a FillReport: store, samples, seconds, bad, truncated. Raises InputError for unusable input or a store of
    other settings, BudgetError above the budget of bad samples.
    """
    from clipdistill.cache.config import CacheConfig
    from clipdistill.cache.fill import fill

    given = dict(data) if isinstance(data, Mapping) else {"path": str(data)}
    values = {
        "teacher": teacher if isinstance(teacher, str) else tuple(teacher), "out": str(out), "views": views,
        "data": {"split": split, **given}, "captions": captions, "dtype": dtype,
        "batch_size": batch_size, "device": device, "engine": engine, **settings,
    }  # fmt: skip
    return fill(build(CacheConfig, values, "cache"), say=lambda line: None if quiet else print(line, file=sys.stderr))


def embed(
    model: str | Path | nn.Module | ClipModel,
    data: Any,
    *,
    split: str | None = None,
    captions: str = "all",
    batch_size: int = 256,
    device: str | None = None,
    workers: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    engine: str = "torch",
    progress: bool = True,
) -> EncodedPairs:
    """Embeddings of the images and captions of `data`, as `evaluate` computes them, in memory.

    `embed_to_file` writes those of any number of pictures or texts.

    model: any name of a model, or a loaded one. data: a name, an opened source, or a list of (image, caption).
    split: of data that has splits (None: test, else val). captions: "all", "first", or "first 5" of each image.
    batch_size: images or captions a forward pass; device: None is where a loaded model is, for names CUDA where there
    is one; workers: processes that decode (None: measured); dtype: of the forward pass; engine: what runs the towers
    (auto: the fastest installed, timed where the set pays for it); progress: a bar and lines on the error stream.

    Returns EncodedPairs: image (N, D) and text (M, D), unit length, float32, on the CPU; text_to_image (M,) the row of
    each caption's image. Raises InputError for unusable input.
    """
    from clipdistill.data.pairs import PairSource
    from clipdistill.embed.encode import encode_pairs
    from clipdistill.evaluate.evaluate import loaded_model, opened_data

    source = opened_data(data, split, None)
    if not isinstance(source, PairSource):
        raise InputError(f"{source.name}: is a labelled set, and pairs of images and captions are needed")
    return encode_pairs(
        loaded_model(model, device), source, batch_size=batch_size, captions=captions, workers=workers,
        progress=progress, dtype=dtype, engine=engine,
    )  # fmt: skip
