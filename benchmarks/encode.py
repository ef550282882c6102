"""Encoding against eager towers at the full context, and `eval` against CLIP_benchmark's way, in turns, in one call.

    python benchmarks/encode.py --data captions.json [--model ViT-B-16] [--quick] [--parts captions,query,fill,eval]
    python benchmarks/encode.py --data captions.json --no-engine --no-sort       # what each part gives: leave it out

The model has random weights, made on the spot: speed does not depend on them. Parts:
captions  text alone; the baseline is `encode_text` on batches of the whole context, as they come.
query     one caption, tokenised and encoded.
fill      `clipdistill cache` of pictures with five captions each; the baseline decodes, prepares and runs eager towers
          at the full context, one batch after the other, and writes the same rows.
eval      1,000 pictures with 5,000 captions; the baseline is CLIP_benchmark's way: a loader that decodes in processes,
          then per batch the image tower, and the text tower on all captions of the batch at the full context.
Ours is timed with each step by itself: `cut` (captions to the longest of their batch), `sort` (in order of length) and
`engine` (conversion is timed apart and counted in the line `with conversion`). Ratios are medians over rounds with
their least and greatest; differences are those of unit rows.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdistill.cache.config import CacheConfig
from clipdistill.cache.fill import fill
from clipdistill.data.loader import prepared
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, PairSource, Subset
from clipdistill.data.views import normalise
from clipdistill.embed.encode import Encoder
from clipdistill.embed.names import ENGINES
from clipdistill.embed.prepare import Item, Preparation
from clipdistill.models import ClipModel, build_student
from clipdistill.models.blocks import as_open_clip
from clipdistill.runtime.machine import cpu_count

Way = Callable[[], Tensor]
PARTS = ("captions", "query", "fill", "eval")


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def in_turn(ways: dict[str, Way], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of each way, its ratio to the first, and the largest difference of its rows from the first's."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rows: dict[str, Tensor] = {}
    for number in range(rounds):
        # back and forth, so that none always follows the same other one
        for name in ways if number % 2 == 0 else reversed(ways):
            began = clock()
            with torch.no_grad():
                rows[name] = ways[name]()
            seconds[name].append(clock() - began)
    first = next(iter(ways))
    found = {}
    for name, values in seconds.items():
        ratios = [plain / own for plain, own in zip(seconds[first], values)]
        found[name] = {
            "seconds": statistics.median(values),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "greatest": max(ratios),
            "difference": float((rows[name] - rows[first]).norm(dim=-1).max()),
        }
    return found


def unit(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.functional.normalize(torch.cat(list(rows)).float(), dim=-1)


class Ways:
    """The ways of one model over one source, made from what the command line left in."""

    def __init__(self, model: ClipModel, source: PairSource, arguments: argparse.Namespace) -> None:
        self.model, self.source, self.batch = model, source, arguments.batch
        self.cut, self.sort, self.engine = arguments.cut, arguments.sort, arguments.engine
        self.dtype = arguments.dtype
        self.workers = cpu_count()
        listed = [source.captions(i)[:5] for i in range(len(source))]
        self.captions = list(dict.fromkeys(itertools.chain(*listed)))
        self.pairs = listed
        self.plain: Any = as_open_clip(copy.deepcopy(self.model.module))
        self.ready: Encoder | None = None
        self.conversion = 0.0

    def encoder(self, engine: str = "torch") -> Encoder:
        """A new one each time, since it keeps what it has encoded; engines are converted once and their time kept."""
        settings: dict[str, Any] = {"engine": engine, "dtype": self.dtype, "progress": False}
        found = Encoder(self.model, batch_size=self.batch, workers=None, **settings)
        if engine != "torch":
            if self.ready is None:
                began = time.perf_counter()
                self.ready = Encoder(self.model, say=print, **settings)
                self.ready.prepare(Subset(self.source, min(64, len(self.source))), most=5)
                self.conversion = time.perf_counter() - began
            found.engines = self.ready.engines
        return found

    def plain_captions(self, captions: Sequence[str] | None = None) -> Tensor:
        tokens = self.model.tokenizer(list(captions or self.captions))
        return unit([self.plain.encode_text(part) for part in tokens.split(self.batch)])

    def cut_captions(self) -> Tensor:
        tokens = self.model.tokenizer(self.captions).split(self.batch)
        return unit([self.plain.encode_text(*self.model.shorten(part)) for part in tokens])

    def texts(self, engine: str = "torch") -> Way:
        return lambda: self.encoder(engine).texts(self.captions)

    def caption_ways(self) -> dict[str, Way]:
        if self.engine:
            self.encoder(self.engine)  # converted before anything is timed
        ways: dict[str, Way] = {"full context": self.plain_captions}
        ways |= {"cut": self.cut_captions} if self.cut else {}
        ways |= {"cut, sorted": self.texts()} if self.sort else {}
        return ways | ({f"cut, sorted, {self.engine}": self.texts(self.engine)} if self.engine else {})

    def query_ways(self) -> dict[str, Way]:
        one = self.captions[:1]
        ways: dict[str, Way] = {"full context": lambda: self.plain_captions(one)}
        for engine in ("torch", self.engine) if self.engine else ("torch",):
            ways[f"encoder, {engine}"] = functools.partial(self.query, self.encoder(engine), one)
        return ways

    def query(self, encoder: Encoder, captions: list[str]) -> Tensor:
        return encoder.encode_tokens(self.model.tokenizer(captions))

    def eager_pairs(self, workers: int) -> tuple[Tensor, Tensor]:
        """Image tower and text tower on each batch, captions at the full context; pictures decoded by `workers`."""
        tasks = [[Item(i) for i in part.tolist()] for part in torch.arange(len(self.source)).split(self.batch)]
        images, texts = [], []
        for chunk in prepared(Preparation(self.source, [self.model.image]), tasks, workers):
            images.append(self.plain.encode_image(normalise(chunk.pixels[0], self.model.image)))
            captions = [text for item in chunk.items for text in self.pairs[item.index]]
            texts.append(self.plain.encode_text(self.model.tokenizer(captions)))
        return unit(images), unit(texts)

    def eval_ways(self) -> dict[str, Way]:
        def ours(engine: str) -> Tensor:
            found = self.encoder(engine).pairs(self.source, "first 5")
            return torch.cat([found.image, found.text])

        ways: dict[str, Way] = {"CLIP_benchmark's way": lambda: torch.cat(self.eager_pairs(self.workers))}
        ways["clipdistill"] = lambda: ours("torch")
        return ways | ({f"clipdistill, {self.engine}": lambda: ours(self.engine)} if self.engine else {})

    def fill_ways(self, data: str, model_name: str, split: str | None) -> dict[str, Way]:
        def plain() -> Tensor:
            images, texts = self.eager_pairs(0)
            with tempfile.TemporaryDirectory() as folder:
                np.save(Path(folder) / "images.npy", images.half().numpy())
                np.save(Path(folder) / "texts.npy", texts.half().numpy())
            return images

        def ours(engine: str) -> Tensor:
            folder = Path(tempfile.mkdtemp())
            values = {
                "teacher": model_name,
                "data": {"path": data, "split": split},
                "out": folder / "c",
                "engine": engine,
                "precision": {"float32": "fp32", "bfloat16": "bf16"}[self.dtype],
            }
            try:
                report = fill(CacheConfig(**values), source=self.source, teachers=[self.model])
                rows = report.store.read(0, range(len(self.source)), [0] * len(self.source), [0] * len(self.source))
                return rows[0].float()
            finally:
                shutil.rmtree(folder)

        ways: dict[str, Way] = {"eager, full context": plain, "clipdistill": lambda: ours("torch")}
        # a conversion is part of this work: a minute or so, which a fill of forty pictures is not worth
        last = {f"clipdistill, {self.engine}, conversion included": lambda: ours(self.engine)}
        return ways | (last if self.engine else {})


def table(what: str, rows: dict[str, Any], conversion: float) -> list[str]:
    lines = [f"| {what} | s | times as fast (least to greatest) | largest difference |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['seconds']:.3f} | {row['ratio']:.2f} ({row['least']:.2f} to {row['greatest']:.2f}) "
            f"| {row['difference']:.1e} |"
        )
    first, last = next(iter(rows.values())), list(rows.values())[-1]
    if conversion and what in ("captions", "eval"):
        whole = last["seconds"] + conversion
        lines.append(f"| with conversion ({conversion:.1f} s) | {whole:.3f} | {first['seconds'] / whole:.2f} | |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="pairs in any form that `clipdistill train` reads")
    add("--split", help="of data that has splits")
    add("--model", default="ViT-B-16")
    add("--parts", default=",".join(PARTS), help="captions, query, fill, eval, separated by commas")
    add("--pictures", type=int, default=1000, help="of eval, with five captions each")
    add("--filled", type=int, default=200, help="pictures of the fill")
    add("--captions", type=int, default=1000)
    add("--batch", type=int, default=64)
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=cpu_count())
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of our side; the baselines are float32")
    add("--clock", choices=CLOCKS, default="wall", help="cpu: processor time of this process, for busy machines")
    add("--engine", choices=ENGINES, default="openvino", help="of the last rows (default: openvino)")
    add("--no-engine", dest="engine", action="store_const", const="", help="leave the engine out")
    add("--no-cut", dest="cut", action="store_false", help="leave the row of cut captions out")
    add("--no-sort", dest="sort", action="store_false", help="leave the row of sorted captions out")
    add("--quick", action="store_true", help="one round, 40 pictures, 150 captions: some minutes on two cores")
    add("--json", type=Path, help="results; the same as Markdown goes beside it")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.captions, arguments.pictures, arguments.filled = 1, 150, 40, 40
    torch.set_num_threads(arguments.threads)
    clock = CLOCKS[arguments.clock]
    whole = open_pairs(DataConfig(path=arguments.data), split=arguments.split, default_split="train")
    model = build_student(arguments.model, seed=0)
    model.module.eval()
    model.reads_only_text  # noqa: B018 - asked once in a model's life

    def ways(pictures: int) -> Ways:
        return Ways(model, Subset(whole, min(pictures, len(whole))), arguments)

    captions = ways(-(-arguments.captions // 5))
    captions.captions = captions.captions[: arguments.captions]
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}",
        "settings": f"{arguments.model}, {len(captions.captions)} captions, {arguments.pictures} pictures evaluated, "
        f"{arguments.filled} filled, batch {arguments.batch}, {arguments.dtype}, {arguments.clock} clock",
    }
    lines = ["# Encoding", "", f"{results['machine']}; {results['settings']}", ""]
    for part in arguments.parts.split(","):
        if part == "captions":
            found, conversion = in_turn(captions.caption_ways(), arguments.rounds, clock), captions.conversion
        elif part == "query":
            found, conversion = in_turn(captions.query_ways(), max(10, 10 * arguments.rounds), clock), 0.0
        elif part == "fill":
            own = ways(arguments.filled)
            found = in_turn(own.fill_ways(arguments.data, arguments.model, arguments.split), arguments.rounds, clock)
            conversion = 0.0
        else:
            own = ways(arguments.pictures)
            own.ready, own.conversion = captions.ready, captions.conversion
            found = in_turn(own.eval_ways(), arguments.rounds, clock)
            conversion = own.conversion
        results[part] = found
        lines += table(part, found, conversion)
        print("\n".join(table(part, found, conversion)), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        arguments.json.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
