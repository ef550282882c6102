"""What the command line does, as functions: distill, cache, embed (others lie in their own rooms).

The packages of these names can be called and are these functions (registry.callable_package).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipdistill.arguments import checked
from clipdistill.config import build
from clipdistill.errors import InputError
from clipdistill.recipes import load_recipe
from clipdistill.train.config import RunConfig

if TYPE_CHECKING:  # torch is loaded when something is computed
    import torch
    from torch import nn

    from clipdistill.cache.fill import FillReport
    from clipdistill.embed.encode import EncodedPairs
    from clipdistill.models.clip_model import ClipModel
    from clipdistill.train.run import Run


@checked
def distill(
    config: RunConfig | Mapping[str, Any],
    *,
    allow_changes: bool = False,
    explain: bool = False,
    quiet: bool = False,
    callbacks: Sequence[Any] = (),
) -> Run:
    """Train a student as `config` says, evaluate it and write everything to its `out`.

    config: a mapping with the key `recipe`, perhaps `size`, and the settings to lay over it (as in a recipe file;
    docs/settings.md has all), or a RunConfig. A folder that holds an interrupted run of the same configuration is
    continued from its newest complete checkpoint; a finished one is returned as it is. A recipe with stages is run
    stage by stage.
    allow_changes: let other settings, data or teachers than the folder's through, and record them. explain: stop after
    the pre-flight and print the objective with its initial magnitudes and the settings; it needs no `out`. quiet: no
    progress on the terminal. callbacks: objects with methods of `Callback`, or registered names.

    Returns the Run (of stages the last one's): folder, status, steps, student (for `load_student`), scores in fractions
    with intervals. Raises InputError for unusable input or a changed configuration, Preempted after a stop signal.
    """
    told: dict[str, Any] = {
        "allow_changes": allow_changes, "explain": explain, "quiet": quiet, "callbacks": callbacks
    }  # fmt: skip
    given = {} if isinstance(config, RunConfig) else dict(config)
    if explain and given:
        given.setdefault("out", f"{tempfile.gettempdir()}/clipdistill-explain-{os.getpid()}")
    recipe, size = given.pop("recipe", None), given.pop("size", None)
    in_stages = recipe is not None and "stages" in load_recipe(recipe, size)
    from clipdistill.train import run, stages

    if not in_stages:
        return run.distill({**given, "recipe": recipe, "size": size} if recipe is not None else config, **told)
    configs = stages.resolve_stages(recipe, given, size=size)
    done = stages.distill_stages(configs, **told)
    return done[-1] if done else run.Run(configs[-1].out, "explained", 0, None)


@checked
def cache(
    teacher: str | Path | Sequence[str | Path],
    data: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    split: str | None = None,
    views: int = 0,
    captions: Literal["all", "first"] = "all",
    dtype: Literal["fp16", "bf16", "int8"] = "fp16",
    recipe: str | Path | None = None,
    synthetic: str | Path | None = None,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    batch_size: int = 64,
    block: int | None = None,
    workers: int | None = None,
    part: str | None = None,
    device: str | torch.device | None = None,
    engine: str = "torch",
    quiet: bool = False,
    **settings: Any,
) -> FillReport:
    """Compute a teacher's embeddings of `data` once, in the folder `out`; called again, it goes on where it stopped.

    teacher: a model's name, or several for an ensemble; then `teacher="cache:OUT"` stands for it in `distill`.
    data: a name, or a mapping of the settings of `data` with its path; split: of data that has splits (None: train).
    views: augmented views stored beside the evaluation view; recipe: whose training views they are drawn as.
    captions: of each image; synthetic: a file of added captions by key; dtype: of the stored rows; precision: of the
    teacher's forward pass; batch_size: pictures a forward pass; block: samples a file (None: by the size of the data);
    workers: processes that decode (None: measured); part: only a share, "0/4"; device: None is a GPU where there is
    one; engine: what runs the teacher ("torch", "auto", "compile", "onnx", "openvino", "ray"); quiet: no lines on the
    error stream; settings: the others of docs/settings.md, for example view_seed=1.

    Returns a FillReport: store, samples, seconds, bad, truncated. Raises InputError for unusable input or a store of
    other settings, BudgetError above the budget of bad samples.
    """
    from clipdistill.cache.config import CacheConfig
    from clipdistill.cache.fill import fill

    given = dict(data) if isinstance(data, Mapping) else {"path": str(data)}
    drawn = {} if recipe is None else load_recipe(recipe).get("train", {}).get("view", {})
    values = {
        "teacher": str(teacher) if isinstance(teacher, str | Path) else tuple(map(str, teacher)), "out": str(out),
        "views": views, "data": {"split": split, **given}, "captions": captions, "dtype": dtype, "precision": precision,
        "batch_size": batch_size, "engine": engine, "view": {"kind": "crop", **drawn},
    }  # fmt: skip
    some = {"synthetic": synthetic, "block": block, "workers": workers, "part": part, "device": device and str(device)}
    values |= {name: value for name, value in some.items() if value is not None} | settings
    return fill(build(CacheConfig, values, "cache"), say=lambda line: None if quiet else print(line, file=sys.stderr))


@checked
def embed(
    model: str | Path | nn.Module | ClipModel,
    data: Any,
    *,
    split: str | None = None,
    captions: str = "all",
    batch_size: int = 256,
    device: str | torch.device | None = None,
    workers: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    engine: str = "torch",
    progress: bool = True,
) -> EncodedPairs:
    """Embeddings of the images and captions of `data`, as `evaluate` computes them, in memory.

    `embed_to_file` writes those of any number of pictures or texts.

    model: any name of a model, or a loaded one. data: a name, an opened source, or a list of (image, caption).
    split: of data that has splits (None: test, else val). captions: "all", "first", or "first 5" of each image.
    batch_size: images or captions a forward pass; device: None is where a loaded model is, for names a GPU where
    there is one; workers: processes that decode (None: measured); dtype: of the forward pass; engine: what runs the
    towers (auto: the fastest installed, timed where the set pays for it); progress: a bar and lines on the error
    stream.

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
