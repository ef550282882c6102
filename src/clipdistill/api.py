"""What the command line does, as functions: cache, embed, export, bench, search. Results show their numbers.

The packages of these names can be called and are these functions (registry.callable_package).
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from clipdistill.config import build
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel
from clipdistill.runtime.console import TextTable, html_page

if TYPE_CHECKING:
    from clipdistill.cache.fill import FillReport
    from clipdistill.embed.encode import EncodedPairs
    from clipdistill.export.graphs import Exported
    from clipdistill.search.collection import Answer


class Measurements(dict[str, Any]):
    """What `bench` measured, JSON-able as `clipdistill bench --json` writes it; shows itself as tables with intervals.

    Keys: "models" (parameters, FLOPs, bytes), "measurements" and "ratios" (lists of rows with value, low, high: images
    or texts a second, 95 %), "device", "settings", "failures", "warnings".
    """

    def __repr__(self) -> str:
        from clipdistill.bench.command import show

        text = io.StringIO()
        show(self, text)
        return text.getvalue().rstrip()

    def _repr_html_(self) -> str:
        return html_page(text=repr(self))


@dataclass(frozen=True)
class SearchResult:
    """What `search` found: one answer a model (the student first), each with its hits, best first.

    photographs: how many are in the index; left_out: file -> why it could not be read.
    """

    query: str
    answers: tuple[Answer, ...]
    photographs: int
    left_out: dict[str, str]

    def table(self) -> TextTable:
        """A row a rank; cosine and file of each model."""
        heads = [f"{answer.role} {what}" for answer in self.answers for what in ("score", "file")]
        table = TextTable(["rank", *heads], title=self.query, text=range(2, 2 * len(self.answers) + 1, 2))
        for rank in range(max(len(answer.hits) for answer in self.answers)):
            row = [str(rank + 1)]
            for answer in self.answers:
                hit = answer.hits[rank] if rank < len(answer.hits) else None
                row += ["", ""] if hit is None else [f"{hit.score:.3f}", hit.path]
            table.rows.append(row)
        return table

    def __repr__(self) -> str:
        return "\n".join(self.table().lines())

    def _repr_html_(self) -> str:
        return html_page([self.table()])


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
    quiet: bool = False,
    **settings: Any,
) -> FillReport:
    """Compute a teacher's embeddings of `data` once, in the folder `out`; called again, it goes on where it stopped.

    teacher: a model's name, or several for an ensemble; then `teacher="cache:OUT"` stands for it in `distill`.
    data: a name, or a mapping of the settings of `data` with its path; split: of data that has splits (None: train).
    views: augmented views stored beside the evaluation view.
    captions: of each image; dtype: of the stored rows; batch_size: pictures a forward pass; device: None is CUDA where
    there is one; quiet: no lines on the error stream; settings: the others of docs/settings.md, for example block=1024.

    Returns a FillReport: store, samples, seconds, bad, truncated. Raises InputError for unusable input or a store of
    other settings, BudgetError above the budget of bad samples.
    """
    from clipdistill.cache.config import CacheConfig
    from clipdistill.cache.fill import fill

    given = dict(data) if isinstance(data, Mapping) else {"path": str(data)}
    values = {
        "teacher": teacher if isinstance(teacher, str) else tuple(teacher), "out": str(out), "views": views,
        "data": {"split": split, **given}, "captions": captions, "dtype": dtype,
        "batch_size": batch_size, "device": device, **settings,
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
    workers: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    progress: bool = True,
) -> EncodedPairs:
    """Embeddings of the images and captions of `data`, as `evaluate` computes them.

    model: any name of a model, or a loaded one. data: a name, an opened source, or a list of (image, caption).
    split: of data that has splits (None: test, else val). captions: "all", "first", or "first 5" of each image.
    batch_size: images or captions a forward pass; device: None is where a loaded model is, for names CUDA where there
    is one; workers: processes that decode; dtype: of the forward pass; progress: a bar on the error stream.

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
        progress=progress, dtype=dtype,
    )  # fmt: skip


def export(
    model: str | Path,
    to: Literal["onnx", "openvino", "open_clip", "hf"],
    out: str | Path,
    *,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    int8: bool = False,
    calibrate: str | None = None,
    calibration_size: int = 128,
    budget: float = 1.0,
    normalised: bool = False,
    tolerance: float = 1e-4,
    opset: int | None = None,
    quiet: bool = False,
) -> Exported:
    """Write a model in a form that other programs load, in the new folder `out`; it appears only if the checks pass.

    model: a run, a model folder or any name. to: the form (docs/deployment.md). data: pairs on which R@1 is measured
    before and after, of their split `split` (None: test, else val), at most `limit` images.
    int8: quantise, calibrated on `calibration_size` pairs of `calibrate` (None: of data), losing at most `budget`
    points of R@1. normalised: embeddings of unit length; tolerance: largest difference of an entry of these; opset:
    ONNX operator set (None: 20). quiet: print nothing.

    Returns an Exported: folder, parities with the model, R@1 before and after. Raises InputError for what cannot be
    exported or misses the tolerance.
    """
    from clipdistill.export.command import run_export

    return run_export(
        str(model), to, Path(out), data=data, split=split, limit=limit, int8=int8, calibrate=calibrate,
        calibration_size=calibration_size, budget=budget, normalised=normalised, tolerance=tolerance, opset=opset,
        quiet=quiet,
    )  # fmt: skip


def bench(
    models: str | Path | Sequence[str | Path],
    *,
    backends: Sequence[str] = ("eager",),
    dtype: str | Sequence[str] = "float32",
    batch_sizes: Sequence[int] = (1, 32),
    towers: Sequence[str] = ("image", "text"),
    seconds: float = 2.0,
    rounds: int = 10,
    threads: int | None = None,
    device: str | None = None,
    data: str | None = None,
    split: str | None = None,
) -> Measurements:
    """Speed, latency and size of models, alternating in one session; ratios refer to the last one named.

    models: names; backends: "eager", "compile", "onnx", "openvino"; dtype: "float32", "bf16", "fp16"; batch_sizes:
    images (texts) a call; towers: "image", "text"; seconds: timed for each model, tower and setting, in `rounds`
    rounds; threads: of torch on the CPU (None: torch's); device: None is CUDA where there is one; data, split: pairs to
    measure end to end too (read, decode, transform, image tower).

    Returns Measurements: images or texts a second with 95 % intervals over rounds, milliseconds, bytes. Raises
    InputError for unknown names and when nothing could be measured.
    """
    from clipdistill.bench.command import measured

    names = [str(name) for name in ([models] if isinstance(models, str | Path) else models)]
    return Measurements(
        measured(
            names, backend=backends, data=data, split=split, dtype=dtype, batch_sizes=batch_sizes, towers=towers,
            seconds=seconds, rounds=rounds, threads=threads, device=device,
        )
    )  # fmt: skip


def search(
    folder: str | Path,
    query: str | Path,
    *,
    model: str | Path,
    teacher: str | Path | None = None,
    top: int = 10,
    index: str | Path | None = None,
    index_kind: Literal["exact", "faiss", "usearch"] = "exact",
    update: bool = True,
    rehash: bool = False,
    batch_size: int = 64,
    workers: int = 4,
    device: str | None = None,
    quiet: bool = True,
) -> SearchResult:
    """The photographs of a folder that are nearest to a query, after bringing the folder's index up to date.

    query: words, or the Path of a picture. model, teacher: names of models; both are asked where both are given.
    top: hits a model. index: folder of the index (None: inside `folder`); index_kind: how the nearest are found;
    update: look at the folder for new and changed files first; rehash: compare the content of every file.
    batch_size: photographs a forward pass; workers: threads that decode; device: None is CUDA where there is one;
    quiet: no progress on the terminal.

    Returns a SearchResult: an answer a model with hits (path, cosine) and milliseconds. Raises InputError for a folder
    without photographs and for a query that cannot be read.
    """
    from clipdistill.models.names import check_model_name
    from clipdistill.search.command import open_collection

    if top < 1 or batch_size < 1 or workers < 1:
        raise InputError("search: top, batch_size and workers must be at least 1")
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder")
    for name in filter(None, (model, teacher)):
        check_model_name(str(name))
    given = argparse.Namespace(
        folder=Path(folder), model=str(model), teacher=None if teacher is None else str(teacher), device=device,
        index=None if index is None else Path(index), index_kind=index_kind, no_update=not update, rehash=rehash,
        batch_size=batch_size, workers=workers, quiet=quiet,
    )  # fmt: skip
    if isinstance(query, Path):
        from clipdistill.data.files import read_image_file
        from clipdistill.data.problems import BadSample

        try:
            picture = read_image_file(query)
        except BadSample as error:
            raise InputError(f"{query}: {error.reason}") from error
        collection = open_collection(given, sys.stderr)
        answers = collection.ask_image(picture, top)
    else:
        collection = open_collection(given, sys.stderr)
        answers = collection.ask_text(query, top)
    return SearchResult(str(query), tuple(answers), len(collection), dict(collection.left_out))
