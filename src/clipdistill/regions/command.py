"""`clipdistill regions`: boxes of a data set, a region teacher measured or exported, a model before and after."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from clipdistill.config import build
from clipdistill.data.pairs import DataConfig
from clipdistill.errors import InputError
from clipdistill.runtime.console import say
from clipdistill.runtime.files import require_place, write_json

_USAGE = """
clipdistill regions boxes --detector X --data D --out DIR          what a detector finds, once for every image
clipdistill regions embed TEACHER --data D --boxes B --store DIR   embeddings of the regions, before a run needs them
clipdistill regions measure TEACHER --data D --boxes B             with its own caption, without, beside the plain CLIP
clipdistill regions export TEACHER --data D --boxes B --out F.parquet    stored vectors, for  --teacher cache:F.parquet
clipdistill regions compare BEFORE AFTER --data D --zero-shot L    retrieval gained and zero-shot accuracy kept

detectors: grid:1+2, torchvision:NAME[@weights], hf:owner/name or hf:folder, ultralytics:yolov8x.pt (AGPL-3.0, yours)
training:  clipdistill train --recipe dclip-teacher ... ; clipdistill train --recipe dclip --teacher runs/teacher ...
"""

ACTIONS = ("boxes", "embed", "measure", "export", "compare")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One action, and what it works on."""
    parser.epilog = _USAGE
    add = parser.add_argument
    add("action", choices=ACTIONS)
    add("models", nargs="*", metavar="MODEL", help="a region teacher; for compare: the model before and the one after")
    add("--data", action="append", help="pairs: a file, folder, pattern of tars, hf:owner/name or scenes (repeatable)")
    add("--split", help="split of the data, where the format has splits")
    add("--image-root", help="folder of the images, where the data file does not say")
    add("--boxes", help="a file of boxes, or a detector")
    add("--detector", help="a detector")
    add("--store", type=Path, help="folder of region embeddings (default: beside the teacher)")
    add("--zero-shot", action="append", default=[], help="a labelled set (repeatable)")
    add("--pairs", type=int, default=200, help="images whose every pair is scored (default 200)")
    add("--out", type=Path, help="folder (boxes), file (export)")
    add("--json", type=Path, help="write the numbers here too")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU when there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Dispatch; returns the exit code."""
    actions = {"boxes": _boxes, "embed": _embed, "measure": _measure, "export": _export, "compare": _compare}
    if arguments.json is not None:
        require_place(arguments.json, "numbers", (b'"teacher"', b'"changes"'))
    actions[arguments.action](arguments)
    return 0


def _data(arguments: argparse.Namespace, path: str) -> dict[str, Any]:
    values = {"path": path, "split": arguments.split, "image_root": arguments.image_root}
    return {k: v for k, v in values.items() if v is not None}


def _needed(arguments: argparse.Namespace, name: str) -> Any:
    value = getattr(arguments, name)
    if not value:
        raise InputError(f"regions {arguments.action}: give --{name.replace('_', '-')} (clipdistill regions --help)")
    return value


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `embed`, `measure` and `export` are told."""
    if len(arguments.models) != 1:
        raise InputError(f"regions {arguments.action}: name one region teacher, the run that trained it or its folder")
    data = _data(arguments, _needed(arguments, "data")[0])
    return {
        "teacher": arguments.models[0], "data": data, "boxes": _needed(arguments, "boxes"), "store": arguments.store,
        "device": arguments.device,
    }  # fmt: skip


def _boxes(arguments: argparse.Namespace) -> None:
    from clipdistill.regions.ask import region_boxes

    data, detector = _data(arguments, _needed(arguments, "data")[0]), _needed(arguments, "detector")
    say(repr(region_boxes(detector, data, _needed(arguments, "out"), device=arguments.device)))


def _embed(arguments: argparse.Namespace) -> None:
    from clipdistill.regions.ask import region_embeddings

    say(repr(region_embeddings(**_given(arguments))))


def _measure(arguments: argparse.Namespace) -> None:
    from clipdistill.regions.ask import region_scores

    measured = region_scores(**_given(arguments), pairs=arguments.pairs)
    measured.table().print()
    if arguments.json is not None:
        write_json(arguments.json, measured.to_json())


def _export(arguments: argparse.Namespace) -> None:
    from clipdistill.regions.ask import region_vectors

    say(repr(region_vectors(**_given(arguments), out=_needed(arguments, "out"))))


def _compare(arguments: argparse.Namespace) -> None:
    from clipdistill.regions.retention import before_after

    if len(arguments.models) != 2:
        raise InputError("regions compare: name two models, the one before and the one after")
    pairs: list[Any] = [build(DataConfig, _data(arguments, path), "regions") for path in arguments.data or []]
    before, after = arguments.models
    changes = before_after(before, after, pairs + arguments.zero_shot, device=arguments.device)
    changes.table().print()
    for note in changes.scores.notes:
        say(note)
    if arguments.json is not None:
        write_json(arguments.json, changes.to_json())
