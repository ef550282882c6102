"""Writes the built-in `scenes` to disk: as WebDataset tars (img2dataset's layout) or Karpathy JSON with images.

Written in shards by as many processes as asked; the files do not depend on their number. Every file is finished under a
temporary name first, and a shard that is already there from the same command is kept, so an interrupted run continues.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

from clipdistill.errors import InputError, nearest
from clipdistill.runtime.files import (
    ABANDONED,
    first_other,
    make_folder,
    new_file,
    read_json,
    remove_leftovers,
    write_json,
    write_together,
)
from clipdistill.runtime.machine import cpu_count
from clipdistill.runtime.progress import Meter
from clipdistill.scenes.pairs import ScenePairs, open_scenes

Format = Literal["webdataset", "karpathy"]
FORMATS: tuple[str, ...] = get_args(Format)


def write_scenes(
    out: Path,
    format: str = "webdataset",
    split: str | None = None,
    size: int | None = None,
    seed: int | None = None,
    shard_size: int = 1000,
    *,
    pixels: int | None = None,
    workers: int | None = None,
    bar: bool = False,
) -> Path:
    """Write one split of the set into the folder `out`.

    Args:
        out: folder, made when absent.
        format: "webdataset" writes OUT/00000.tar, ... with NNNNNNNNN.png/.txt/.json a sample (.txt: first caption;
            .json: all captions and the ground truth) and NNNNN_stats.json; "karpathy" writes OUT/images/... and
            OUT/dataset.json.
        split, size, seed, pixels: as in scenes.open_scenes.
        shard_size: samples in one tar (or in one sub-folder of images).
        workers: processes; None is the number of cores.
        bar: show progress.
    Returns: the path to give as data: the folder of tars or the JSON file.
    Raises: InputError for an unknown format, or when `out` holds another set.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format '{format}' to write scenes in{nearest(format, FORMATS)}")
    if not 1 <= shard_size <= 10_000:
        raise InputError(f"shard_size must be between 1 and 10,000, got {shard_size}")
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    source = open_scenes(split, size, seed, pixels)
    out = make_folder(out, "scenes")
    _claim(out, source, format, shard_size)
    shards = [range(start, min(start + shard_size, len(source))) for start in range(0, len(source), shard_size)]
    write = _write_tar if format == "webdataset" else _write_images
    entries: list[list[dict[str, Any]]] = [[] for _ in shards]
    with Meter(f"{source.name} as {format}", len(source), enabled=bar) as meter:
        for number, result in enumerate(_spread(write, out, source, shards, workers or cpu_count())):
            entries[number] = result
            meter.advance(len(shards[number]))
    if format == "webdataset":
        return out
    document = {"dataset": source.name, "images": [entry for shard in entries for entry in shard]}
    write_together({out / "dataset.json": json.dumps(document)})
    return out / "dataset.json"


def _spread(
    write: Any, out: Path, source: ScenePairs, shards: list[range], workers: int
) -> Iterator[list[dict[str, Any]]]:
    """The results of `write` for every shard, in order."""
    if workers == 1 or len(shards) == 1:
        for number, shard in enumerate(shards):
            yield write(out, source, number, shard)
        return
    with ProcessPoolExecutor(min(workers, len(shards))) as pool:
        futures = [pool.submit(write, out, source, number, shard) for number, shard in enumerate(shards)]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _claim(out: Path, source: ScenePairs, format: str, shard_size: int) -> None:
    """Mark the folder as holding this set; InputError when it holds something else."""
    about = {
        **{"dataset": source.name, "format": format, "size": len(source), "seed": source.seed, "pixels": source.pixels},
        **{"shard_size": shard_size, "fingerprint": source.fingerprint()},
    }
    mark = out / "scenes.info"
    if mark.is_file():
        with contextlib.suppress(InputError):  # a damaged mark says that the folder holds something else
            if read_json(mark) == about:
                for folder in (out, *out.glob("images/*")):  # of a run that was killed
                    remove_leftovers(folder, older_than=ABANDONED)
                return
        raise InputError(f"'{out}' already holds other scenes ({mark.name} says which): name another folder")
    if other := first_other(out):
        raise InputError(f"'{out}' is not empty ({other}): name another folder")
    write_json(mark, about)


def _write_tar(out: Path, source: ScenePairs, number: int, samples: range) -> list[dict[str, Any]]:
    """One shard with its statistics file, which is written last: it says that the shard is whole."""
    stats = out / f"{number:05d}_stats.json"
    if stats.is_file():
        return []
    with (
        new_file(out / f"{number:05d}.tar") as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for place, i in enumerate(samples):
            key = f"{number:05d}{place:04d}"
            image, captions = source.image_bytes(i), source.captions(i)
            about = {
                **{"key": key, "caption": captions[0], "captions": captions, "status": "success", "url": None},
                **{"width": source.pixels, "height": source.pixels, "sha256": hashlib.sha256(image).hexdigest()},
                **{"original_width": source.pixels, "original_height": source.pixels, "exif": "{}"},
                **{"scene_key": source.key(i), "scene": _ground_truth(source, i)},
            }
            for kind, content in (("png", image), ("txt", captions[0].encode()), ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    write_together({stats: json.dumps({"count": len(samples), "successes": len(samples)})})
    return []


def _write_images(out: Path, source: ScenePairs, number: int, samples: range) -> list[dict[str, Any]]:
    """The images of one sub-folder; returns their entries in the JSON file."""
    folder = f"{number:05d}"
    (out / "images" / folder).mkdir(parents=True, exist_ok=True)
    entries = []
    for i in samples:
        name = f"{source.key(i)}.png"
        path = out / "images" / folder / name
        if not path.is_file():
            write_together({path: source.image_bytes(i)})
        captions = source.captions(i)
        identifiers = [i * len(captions) + k for k in range(len(captions))]
        sentences = [
            {"tokens": text.replace(",", "").split(), "raw": text, "imgid": i, "sentid": identifier}
            for text, identifier in zip(captions, identifiers)
        ]
        entry = {"filename": name, "filepath": f"images/{folder}", "imgid": i, "split": source.split}
        entries.append({**entry, "sentids": identifiers, "sentences": sentences, "scene": _ground_truth(source, i)})
    return entries


def _ground_truth(source: ScenePairs, i: int) -> dict[str, Any]:
    """The scene as JSON: background, things in drawing order, nesting and overlap by their indices."""
    scene = source.scene(i)
    things = [
        {
            **{"shape": t.shape, "colour": t.colour, "texture": t.texture, "size": t.size},
            **{"x": round(t.x, 4), "y": round(t.y, 4), "radius": round(t.radius, 4)},
        }
        for t in scene.things
    ]
    return {"background": scene.background, "things": things, "inside": scene.inside, "in_front": scene.in_front}
