"""`clipdistill regions`: boxes of a data set, a region teacher measured or exported, a model before and after."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from clipdistill.config import build
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.errors import InputError
from clipdistill.runtime.console import say
from clipdistill.runtime.files import require_place, write_json
from clipdistill.train.region_config import RegionsConfig

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
    add("--device", help="cpu, cuda (default: CUDA when there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Dispatch; returns the exit code."""
    actions = {"boxes": _boxes, "embed": _embed, "measure": _measure, "export": _export, "compare": _compare}
    if arguments.json is not None:
        require_place(arguments.json, "numbers", (b'"teacher"', b'"changes"'))
    actions[arguments.action](arguments)
    return 0


def _data(arguments: argparse.Namespace, path: str) -> DataConfig:
    values = {"path": path, "split": arguments.split, "image_root": arguments.image_root}
    return build(DataConfig, {k: v for k, v in values.items() if v is not None}, "regions")


def _source(arguments: argparse.Namespace, default_split: str) -> PairSource:
    source = open_pairs(_data(arguments, _needed(arguments, "data")[0]), default_split=default_split)
    if source.problems:
        say(source.problems.sentence(source.name))
    return source


def _needed(arguments: argparse.Namespace, name: str) -> Any:
    value = getattr(arguments, name)
    if not value:
        raise InputError(f"regions {arguments.action}: give --{name.replace('_', '-')} (clipdistill regions --help)")
    return value


def _boxes(arguments: argparse.Namespace) -> None:
    source = _source(arguments, "train")
    from clipdistill.regions.box_file import detect
    from clipdistill.regions.detectors import open_detector
    from clipdistill.runtime.machine import pick_device

    detector = open_detector(_needed(arguments, "detector"), pick_device(arguments.device))
    boxes = detect(source, detector, _needed(arguments, "out"), progress=lambda done, all: say(f"{done}/{all} images"))
    say(f"{arguments.out}: boxes of {len(boxes)} images by {detector.name}")


def _opened(arguments: argparse.Namespace, default_split: str) -> Any:
    """The named teacher, the data, its regions, the device."""
    from clipdistill.regions.meta_teacher import read_meta_teacher, region_teacher_folder
    from clipdistill.regions.teacher import open_store
    from clipdistill.runtime.machine import pick_device

    if len(arguments.models) != 1:
        raise InputError(f"regions {arguments.action}: name one region teacher, the run that trained it or its folder")
    folder = region_teacher_folder(arguments.models[0])
    if folder is None:
        raise InputError(f"'{arguments.models[0]}' is no region teacher: train one with --recipe dclip-teacher")
    device = pick_device(arguments.device)
    teacher, source = read_meta_teacher(folder), _source(arguments, default_split)
    values = {"boxes": _needed(arguments, "boxes"), "store": arguments.store or folder.parent / "regions"}
    config = build(RegionsConfig, values, "regions")
    store = open_store(config, source, teacher.clip, teacher.config, folder.parent, device, say)
    return teacher.to(device), source, store, device


def _embed(arguments: argparse.Namespace) -> None:
    _, source, store, _ = _opened(arguments, "train")
    counts = store.counts()
    say(f"{store.folder}: {int(counts.sum())} regions of {len(source)} images, {counts.float().mean():.1f} each")


def _measure(arguments: argparse.Namespace) -> None:
    from clipdistill.regions.measure import measure

    teacher, source, store, device = _opened(arguments, "val")
    measured = measure(teacher, source, store, pairs=arguments.pairs, device=device)
    measured.table().print()
    if arguments.json is not None:
        write_json(arguments.json, measured.to_json())


def _export(arguments: argparse.Namespace) -> None:
    from clipdistill.regions.teacher import export

    out = _needed(arguments, "out")
    teacher, source, store, device = _opened(arguments, "train")
    count = export(teacher, source, store, out, device=device)
    say(f"{out}: {count} images; use it as  --teacher cache:{out}")


def _compare(arguments: argparse.Namespace) -> None:
    from clipdistill.regions.retention import before_after, table, to_json

    if len(arguments.models) != 2:
        raise InputError("regions compare: name two models, the one before and the one after")
    data: list[Any] = [_data(arguments, path) for path in arguments.data or []]
    before, after = arguments.models
    changes, scores = before_after(before, after, data + arguments.zero_shot, device=arguments.device)
    table(changes).print()
    for note in scores.notes:
        say(note)
    if arguments.json is not None:
        write_json(arguments.json, to_json(changes))
