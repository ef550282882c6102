"""Many passes over pairs with workers and injected faults: no sample lost or repeated, no memory or file handle leaked.

    python benchmarks/soak.py [--data ../shared/data/flickr8k/dataset_flickr8k.json:all] [--passes 10] [--workers 2]
                              [--kinds files,tars] [--json soak.json]

The pairs are written once more, as files with a Karpathy JSON and as tars, with faults: images cut short, web pages
and empty files in place of images, files that are missing from the start and files that vanish after the data were
opened, a tar cut in its middle, one that is no tar, one that vanishes later. One PairLoader then makes all passes, as a
training run would. Checked in every pass: each sample of the pass's order is met once, good samples give the same
pixels, tokens and captions as in the first pass, and exactly the spoiled ones are reported. Measured at sixteen moments
of every pass, over this process and its workers: memory, open files, threads. Compared are each pass's median of memory
and its least of files and threads: batches on their way between processes hold files open for a moment.
Memory is what these processes hold together that no file on disk backs, pages that they share counted once (the sums of
Pss_Anon and Pss_Shmem): the libraries' code, which other programs share, does not blur it. Exit code 1 when a sample
was lost or something grew by more than `--limit` from the second pass on. Needs /proc (Linux 5.9 or later).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from clipdistill.data.loader import Batch, PairLoader
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import PairSource
from clipdistill.data.sampler import epoch_order
from clipdistill.data.views import ImageSpec, ViewPolicy
from clipdistill.models.tokenizers import ClipBpeTokenizer

MOMENTS = 16  # of each pass at which the processes are measured
SHARDS = 7


@dataclass
class Faults:
    """What was done to the samples, by index: `spoiled` ones must be reported, `absent` ones left out at opening."""

    spoiled: set[int] = field(default_factory=set)
    absent: set[int] = field(default_factory=set)
    later: list[Path] = field(default_factory=list)

    def vanish(self) -> None:
        """Take away what is to disappear after the data were opened."""
        for path in self.later:
            path.unlink()


def spoil(data: bytes, rng: random.Random) -> bytes:
    """An image that cannot be used."""
    return rng.choice((data[: len(data) // 2], b"<!DOCTYPE html><html>not found</html>", b"", rng.randbytes(len(data))))


def write_files(source: PairSource, folder: Path, rng: random.Random) -> tuple[Path, Faults]:
    """Images and a Karpathy JSON; one image in fifty spoiled, one in a hundred missing, one in a hundred vanishing."""
    faults = Faults()
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(len(source)):
        name, draw = f"{i:06d}.jpg", rng.random()
        if i < 3:
            draw = (0.005, 0.02, 0.035)[i]  # one of each kind however few there are
        rows.append({"filename": name, "split": "train", "sentences": [{"raw": c} for c in source.captions(i)]})
        path = folder / "images" / name
        if draw < 0.01:
            faults.absent.add(i)
            continue
        data = source.image_bytes(i)
        if draw < 0.03:
            data = spoil(data, rng)
            faults.spoiled.add(i)
        elif draw < 0.04:
            faults.spoiled.add(i)
            faults.later.append(path)
        path.write_bytes(data)
    table = folder / "pairs.json"
    table.write_text(json.dumps({"images": rows}), encoding="utf-8")
    return table, faults


def write_tars(source: PairSource, folder: Path, rng: random.Random) -> tuple[Path, Faults]:
    """Seven shards: one is cut in its middle, one vanishes later; an eighth is no tar. One image in fifty is bad."""
    faults = Faults()
    folder.mkdir(parents=True)
    each = -(-len(source) // SHARDS)
    for shard in range(SHARDS):
        path, ends = folder / f"{shard:05d}.tar", {}
        members = range(shard * each, min((shard + 1) * each, len(source)))
        with tarfile.open(path, "w") as archive:
            for i in members:
                data = source.image_bytes(i)
                if rng.random() < 0.02:
                    data = spoil(data, rng)
                    faults.spoiled.add(i)
                record = json.dumps({"captions": source.captions(i)}).encode()
                for name, content in ((f"{i:06d}.jpg", data), (f"{i:06d}.json", record)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                ends[i] = archive.offset
        if shard == 2:
            cut = path.stat().st_size // 2
            os.truncate(path, cut)
            faults.absent |= {i for i, end in ends.items() if end > cut}
        if shard == 4:
            faults.later.append(path)
            faults.spoiled |= set(members)
    (folder / "99999.tar").write_bytes(b"<html>not found</html>" * 99)
    faults.spoiled -= faults.absent
    return folder, faults


@dataclass
class Reading:
    """Bytes and counts of this process and its workers at one moment."""

    memory: int = 0
    files: int = 0
    threads: int = 0
    own_memory: int = 0


def children(process: int) -> list[int]:
    """Processes started by the main thread of `process`."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def measure() -> Reading:
    """Sum over this process and its children."""
    total = Reading()
    for process in (os.getpid(), *children(os.getpid())):
        place = Path(f"/proc/{process}")
        try:
            sizes = {
                line.split(":")[0]: int(line.split()[1]) * 1024
                for line in (place / "smaps_rollup").read_text().splitlines()[1:]
            }
            memory = sizes["Pss_Anon"] + sizes["Pss_Shmem"]
            total.memory += memory
            total.files += len(list((place / "fd").iterdir()))
            total.threads += len(list((place / "task").iterdir()))
        except OSError:
            continue  # it has just ended
        if process == os.getpid():
            total.own_memory = memory
    return total


def digests(batch: Batch) -> Iterable[tuple[int, int]]:
    """(sample, checksum of its pixels, tokens and caption) of each row."""
    for row, i in enumerate(batch.indices.tolist()):
        content = zlib.crc32(batch.student_images[row].numpy())
        content = zlib.crc32(batch.student_tokens[row].numpy(), content)
        yield i, zlib.crc32(batch.captions[row].encode(), content)


def soak(
    where: Path, faults: Faults, *, passes: int, workers: int, batch: int, size: int, exact: bool, say: bool = True
) -> dict[str, Any]:
    """Make the passes; what was lost, repeated, changed or misreported in each, and what was measured."""
    source = open_pairs(str(where))
    faults.vanish()
    model = SimpleNamespace(image=ImageSpec(size=size), tokenizer=ClipBpeTokenizer())
    # numbers of the samples as they were written, by place in the opened source
    names = [int(source.key(i).rpartition("/")[2].split(".")[0]) for i in range(len(source))]
    batch = min(batch, len(source))
    per_pass = len(source) // batch
    loader = PairLoader(
        source, batch_size=batch, student=model, view=ViewPolicy(), caption="first", seed=5, workers=workers,
        steps=passes * per_pass, exact=exact,
    )  # fmt: skip
    first: dict[int, int] = {}
    result: dict[str, Any] = {"samples": len(source), "left_out": sorted(faults.absent & set(names)), "passes": []}
    result["opening"] = dict(source.problems.counts)
    moments = {per_pass * k // MOMENTS for k in range(MOMENTS)}
    batches, began = iter(loader), time.monotonic()
    for number in range(passes):
        seen: list[int] = []
        reported: list[int] = []
        changed, readings = 0, []
        for step in range(per_pass):
            made = next(batches)
            for i, digest in digests(made):
                seen.append(i)
                changed += first.setdefault(i, digest) != digest
            reported += [int(key.rpartition("/")[2].split(".")[0]) for key, _ in made.problems]
            del made
            if step in moments:
                readings.append(measure())
        expected = set(epoch_order(len(source), 5, number)[: per_pass * batch].tolist())
        good = {i for i in expected if names[i] not in faults.spoiled}
        measured = {
            key: (statistics.median if "memory" in key else min)(getattr(reading, key) for reading in readings)
            for key in vars(readings[0])
        }
        row = {
            "lost": len(good - set(seen)),
            "repeated": len(seen) - len(set(seen)) + len(reported) - len(set(reported)),
            "changed": changed,
            "unwanted": len(set(seen) - good),
            "misreported": len(set(reported) ^ {names[i] for i in expected - good}),
            "seconds": time.monotonic() - began,
            **measured,
        }
        result["passes"].append(row)
        if say:
            print(
                f"pass {number + 1:2d}: {len(seen)} good, {len(reported)} bad, lost {row['lost']}, repeated "
                f"{row['repeated']}, changed {changed}; {measured['memory'] / 2**20:.1f} MiB (this process "
                f"{measured['own_memory'] / 2**20:.1f}), {measured['files']:.0f} files, "
                f"{measured['threads']:.0f} threads",
                flush=True,
            )
    rest = next(batches, None)
    result["too_many"] = rest is not None
    return result


def verdict(result: dict[str, Any], limit: float) -> list[str]:
    """What is wrong, in words; nothing when all is well."""
    complaints = []
    rows = result["passes"]
    for what in ("lost", "repeated", "changed", "unwanted", "misreported"):
        total = sum(row[what] for row in rows)
        if total:
            complaints.append(f"{total} samples {what}")
    if result["left_out"] or result["too_many"]:
        complaints.append("samples that are not there were opened, or batches came after the last")
    if len(rows) > 2:
        for what in ("memory", "files", "threads"):
            growth = rows[-1][what] / rows[1][what] - 1
            result[f"{what}_growth"] = growth
            if growth > limit:
                complaints.append(f"{what} grew by {growth:.1%} from pass 2 to pass {len(rows)}")
    return complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes:train?size=700", help="pairs to take the samples from")
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--kinds", default="files,tars")
    parser.add_argument("--exact", action="store_true", help="Pillow's pixels instead of the fast ones")
    parser.add_argument("--limit", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = open_pairs(arguments.data)
    results, wrong = {}, False
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["CLIPDISTILL_CACHE"] = str(Path(temporary) / "cache")
        for kind in arguments.kinds.split(","):
            write = {"files": write_files, "tars": write_tars}[kind]
            where, faults = write(source, Path(temporary) / kind, random.Random(arguments.seed))
            print(
                f"{kind}: {len(source)} samples, {len(faults.spoiled)} spoiled, {len(faults.absent)} absent", flush=True
            )
            result = soak(
                where, faults, passes=arguments.passes, workers=arguments.workers, batch=arguments.batch,
                size=arguments.size, exact=arguments.exact,
            )  # fmt: skip
            complaints = verdict(result, arguments.limit)
            results[kind] = {**result, "complaints": complaints}
            growth = ", ".join(f"{k[:-7]} {v:+.2%}" for k, v in result.items() if k.endswith("_growth"))
            print(f"{kind}: {'; '.join(complaints) or 'all well'} ({growth})", flush=True)
            wrong = wrong or bool(complaints)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
