"""Images per second of our loader against a plain PIL loader and open_clip's own, from JPEG files and from tars.

    python benchmarks/data.py [--workers 2] [--rounds 3] [--images 600] [--clock wall] [--json out.json]

All contenders prepare the same photographs and captions for a model of 224 pixels (open_clip's evaluation transform,
CLIP's tokenizer) on the same cores; they take turns, and each one's best and median round are printed. A round's
clock runs from the first demand for a batch to the last batch, starting the workers included. `exact` are the same
pixels to the bit (checked before the race); `fast` is PairLoader(exact=False): within rounding of them.
open_clip's own loader is its training pipeline: CSV data set for files (needs pandas), webdataset for
tars (needs webdataset<=0.2.86: newer ones it cannot read with).
"""

from __future__ import annotations

import argparse
import functools
import gc
import io
import json
import os
import resource
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from PIL import Image

from clipdistill.data.loader import PairLoader
from clipdistill.data.open import open_pairs
from clipdistill.data.views import OPENAI_MEAN, OPENAI_STD, ImageSpec, ViewPolicy

BATCH = 50


def photographs(folder: Path | None, count: int, side: int) -> list[tuple[bytes, str]]:
    """JPEGs with longer side `side` and a caption each: mosaics of four real photographs where there are any."""
    source = open_pairs(str(folder)) if folder is not None else open_pairs("scenes:train?size=120")
    tiles = [source.image(i) for i in range(min(len(source), 120))]
    large, made = (500, 376), []
    for number in range(count):
        mosaic = Image.new("RGB", large)
        for quarter in range(4):
            tile = tiles[(7 * number + quarter) % len(tiles)].crop((0, 0, large[0] // 2, large[1] // 2))
            mosaic.paste(tile, ((quarter % 2) * large[0] // 2, (quarter // 2) * large[1] // 2))
        if side != large[0]:
            mosaic = mosaic.resize((side, side * large[1] // large[0]), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        mosaic.save(buffer, "JPEG", quality=90)
        made.append((buffer.getvalue(), source.captions(number % len(source))[0]))
    return made


def write(folder: Path, pairs: list[tuple[bytes, str]]) -> tuple[Path, Path]:
    """The pairs as files with a table, and as eight tars."""
    table, shards = folder / "pairs.tsv", folder / "tars"
    shards.mkdir(parents=True)
    lines = ["filepath\ttitle"]
    for number, (data, caption) in enumerate(pairs):
        path = folder / f"{number:06d}.jpg"
        path.write_bytes(data)
        lines.append(f"{path}\t{caption}")
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    each = max(1, len(pairs) // 8)
    for shard in range(0, len(pairs), each):
        with tarfile.open(shards / f"{shard // each:05d}.tar", "w") as archive:
            for number, (data, caption) in enumerate(pairs[shard : shard + each], start=shard):
                for name, content in ((f"{number:09d}.jpg", data), (f"{number:09d}.txt", caption.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return table, shards


class PlainFiles(torch.utils.data.Dataset):
    """The loader everybody writes: PIL, open_clip's transform, open_clip's tokenizer."""

    def __init__(self, table: Path, transform: Any, tokenizer: Any) -> None:
        rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()[1:]]
        self.rows, self.transform, self.tokenizer = rows, transform, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        path, caption = self.rows[i]
        return self.transform(Image.open(path).convert("RGB")), self.tokenizer([caption])[0]


class PlainTars(PlainFiles):
    """The same over tars, with tarfile's own random access."""

    def __init__(self, shards: Path, transform: Any, tokenizer: Any) -> None:
        self.transform, self.tokenizer = transform, tokenizer
        self.archives = sorted(shards.glob("*.tar"))
        self.members = []
        for number, path in enumerate(self.archives):
            with tarfile.open(path) as archive:
                found = {m.name: m for m in archive}
            self.members += [(number, found[n], found[n[:-3] + "txt"]) for n in found if n.endswith(".jpg")]
        self.open: dict[int, tarfile.TarFile] = {}

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        number, image, text = self.members[i]
        if number not in self.open:
            self.open[number] = tarfile.open(self.archives[number])  # noqa: SIM115 - kept open, as one would
        read = lambda member: self.open[number].extractfile(member).read()  # noqa: E731
        picture = Image.open(io.BytesIO(read(image))).convert("RGB")
        return self.transform(picture), self.tokenizer([read(text).decode()])[0]


def plain(dataset: Any, workers: int) -> Iterable[Any]:
    return torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=workers)


def open_clip_own(kind: str, where: Path, count: int, transform: Any, tokenizer: Any, workers: int) -> Iterable[Any]:
    """open_clip's training loaders with the evaluation transform."""
    from open_clip_train.data import get_csv_dataset, get_wds_dataset

    data = str(where)
    if kind == "tars":
        shards = sorted(where.glob("*.tar"))
        data = f"{where}/{{{shards[0].stem}..{shards[-1].stem}}}.tar"
    arguments = SimpleNamespace(
        train_data=data, val_data=data, csv_img_key="filepath", csv_caption_key="title", csv_separator="\t",
        distributed=False, batch_size=BATCH, workers=workers, seed=0, world_size=1, train_num_samples=count,
        val_num_samples=count, dataset_resampled=False, train_data_upsampling_factors=None, use_naflex=False,
    )  # fmt: skip
    if kind == "files":
        return get_csv_dataset(arguments, transform, is_train=True, tokenizer=tokenizer).dataloader
    return get_wds_dataset(arguments, transform, is_train=True, floor=True, tokenizer=tokenizer).dataloader


def ours(where: Path, count: int, spec: ImageSpec, workers: int, exact: bool) -> Iterable[Any]:
    from clipdistill.models.tokenizers import ClipBpeTokenizer

    model = SimpleNamespace(image=spec, tokenizer=ClipBpeTokenizer())
    return PairLoader(
        open_pairs(str(where)), batch_size=BATCH, student=model, view=ViewPolicy(), workers=workers,
        steps=count // BATCH, exact=exact,
    )  # fmt: skip


def wall_clock() -> float:
    return time.perf_counter()


def cpu_clock() -> float:
    """Processor seconds of this process and of the workers that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def race(
    contenders: dict[str, Callable[[], Iterable[Any]]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Images per second of each contender and round, in turns."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, make in contenders.items():
            loader, images = make(), 0
            began = clock()
            for batch in loader:
                images += len(batch[0]) if isinstance(batch, list | tuple) else len(batch.keys)
            del loader, batch
            gc.collect()  # ends workers that a loader would keep for another epoch
            speeds[name].append(images / (clock() - began))
    return speeds


def check_equal(table: Path, spec: ImageSpec, transform: Any, count: int) -> dict[str, float]:
    """Assert that our exact pixels are the plain loader's to the bit; how far the fast ones are from them."""
    by_path = {path: i for i, (path, _) in enumerate(PlainFiles(table, transform, None).rows)}
    plain_images = PlainFiles(table, transform, lambda c: [torch.zeros(1)])
    largest, differing, values = 0.0, 0, 0
    step = torch.tensor(spec.std).min() * 255
    for exact in (True, False):
        for batch in ours(table, min(count, 2 * BATCH), spec, 0, exact):
            for key, image in zip(batch.keys, batch.student_images):
                expected = plain_images[by_path[key]][0]
                if exact:
                    assert torch.equal(image, expected), key
                else:
                    difference = (image - expected).abs() * step
                    largest = max(largest, float(difference.max()))
                    differing += int((difference > 0.5).sum())
                    values += difference.numel()
    return {"fast_largest_difference_of_255": round(largest), "fast_share_differing": differing / values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1200, help="a multiple of 400")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--sides", type=int, nargs="+", default=[144, 500], help="longer sides of the photographs")
    parser.add_argument("--photographs", type=Path, help="pairs to take the pictures from (default: drawn scenes)")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: images per processor second, for a busy machine"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    count, workers = arguments.images, arguments.workers
    spec = ImageSpec(size=arguments.size)
    transform = open_clip.image_transform(arguments.size, is_train=False, mean=OPENAI_MEAN, std=OPENAI_STD)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    results: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "workers": workers,
        "images": count,
        "clock": arguments.clock,
    }
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["CLIPDISTILL_CACHE"] = str(Path(temporary) / "cache")
        for side in arguments.sides:
            table, shards = write(Path(temporary) / str(side), photographs(arguments.photographs, count, side))
            results[f"{side}px_pixels"] = check_equal(table, spec, transform, count)
            for kind, where, dataset in (("files", table, PlainFiles), ("tars", shards, PlainTars)):
                contenders: dict[str, Callable[[], Iterable[Any]]] = {
                    "plain": functools.partial(plain, dataset(where, transform, tokenizer), workers),
                    "open_clip": functools.partial(open_clip_own, kind, where, count, transform, tokenizer, workers),
                    "exact": functools.partial(ours, where, count, spec, workers, True),
                    "fast": functools.partial(ours, where, count, spec, workers, False),
                }
                try:
                    next(iter(contenders["open_clip"]()))
                except (ImportError, KeyError) as error:
                    print(f"open_clip's own loader is left out ({type(error).__name__}: {str(error)[-60:]!r})")
                    del contenders["open_clip"]
                speeds = race(contenders, arguments.rounds, cpu_clock if arguments.clock == "cpu" else wall_clock)
                results[f"{side}px_{kind}"] = speeds
                theirs = max(max(v) for k, v in speeds.items() if k in ("plain", "open_clip"))
                for name, values in speeds.items():
                    print(
                        f"{side:4d} px {kind:5s} {name:10s} best {max(values):7.1f}  median "
                        f"{statistics.median(values):7.1f} images/s  {max(values) / theirs:.2f} x theirs",
                        flush=True,
                    )
    print(json.dumps({k: v for k, v in results.items() if k.endswith("pixels")}))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
