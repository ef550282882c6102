"""`clipdistill cache`: fill a store of teacher embeddings; verify, describe, merge and export stores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from clipdistill.cache.config import CacheConfig
from clipdistill.config import agreed, build, override
from clipdistill.embed.names import add_engine
from clipdistill.errors import InputError
from clipdistill.models.names import check_model_name
from clipdistill.recipes import load_recipe
from clipdistill.runtime.console import file_size

ACTIONS = ("verify", "info", "merge", "export")
_USAGE = """
clipdistill cache --teacher T --data D --out DIR [options] [key=value ...]   fill (again: go on, or grow)
clipdistill cache verify DIR                     read every byte and compare with the checksums
clipdistill cache info DIR                       what a store holds
clipdistill cache merge OUT DIR DIR ...          shares of the same data, or stores of different data, into one
clipdistill cache export DIR OUT --data D        WebDataset form: a tar beside each data tar

settings: view.scale=[0.3,1] view.flip=0.5 view.randaugment_ops=2 data.bad_sample_budget=0.01 block=1024 view_seed=1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a fill; verify, info, merge and export take folders."""
    parser.epilog = _USAGE
    add = parser.add_argument
    add("words", nargs="*", metavar="ACTION FOLDER... | key=value...", help="see below")
    add("--teacher", help="a model name or path (hf:..., onnx:DIR too); several, separated by commas, for an ensemble")
    add("--data", help="the pairs: a file, folder, pattern of tars, hf:owner/name or scenes")
    add("--split", help="split of the data, where the format has splits (default: train)")
    add("--image-root", help="folder of the images, where the data file does not say")
    add("--out", help="folder of the store")
    add("--views", type=int, help="augmented views to store beside the evaluation view (default 0)")
    add("--recipe", help="draw the stored views as this recipe draws its training views")
    add("--captions", choices=("all", "first"), help="which captions of an image (default all)")
    add("--synthetic", help="a file of added captions by key: JSON, JSON lines or Parquet")
    add("--dtype", choices=("fp16", "bf16", "int8"), help="number format of the stored rows (default fp16)")
    add("--precision", choices=("auto", "bf16", "fp32"), help="of the teacher's forward pass (default: bf16 on a GPU)")
    add("--batch-size", type=int, help="pictures a forward pass (default 64)")
    add("--block", type=int, help="samples a file (default: from the size of the data, at most 4096)")
    add_engine(add, default=None)
    add("--workers", type=int, help="processes that decode (default: as many as keep the teacher busy, measured)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU when there is one; LOCAL_RANK under torchrun)")
    add("--part", help="fill only a static share: 0/4, 1/4, ... on machines without a common disk; merge them later")
    add("--allow-versions", action="store_true", default=None, help="go on although libraries have changed")
    add("--quiet", action="store_true", help="no progress on the terminal")


def run(arguments: argparse.Namespace) -> int:
    """Dispatch; returns the exit code (1 when verify found something)."""
    words = list(arguments.words)
    if words and words[0] in ACTIONS:
        given = [name for name, value in vars(arguments).items() if value and name not in ("words", "plugins")]
        used = ("data", "split", "quiet") if words[0] == "export" else ("quiet",)
        if unused := next((name for name in given if name not in used), None):
            raise InputError(f"cache {words[0]}: --{unused.replace('_', '-')} is for filling a cache: leave it out")
        return {"verify": _verify, "info": _info, "merge": _merge, "export": _export}[words[0]](words[1:], arguments)
    return _fill(words, arguments)


def _fill(assignments: list[str], arguments: argparse.Namespace) -> int:
    for name, example in (
        ("teacher", "--teacher ViT-B-16/laion400m_e32"),
        ("data", "--data captions.json"),
        ("out", "--out cache"),
    ):
        if getattr(arguments, name) is None:
            raise InputError(f"cache: no {name} was named; give one, for example  {example}")
    values: dict[str, Any] = {"view": {"kind": "crop"}}
    if arguments.recipe is not None:
        view = load_recipe(arguments.recipe).get("train", {}).get("view")
        if view:
            values["view"] = view
    names = (
        "teacher", "out", "views", "captions", "synthetic", "dtype", "precision", "batch_size", "block", "engine",
        "workers", "device", "part", "allow_versions",
    )  # fmt: skip
    values |= {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    data = {"path": arguments.data, "split": arguments.split, "image_root": arguments.image_root}
    values["data"] = {name: value for name, value in data.items() if value is not None}
    agreed({key: value for key, value in values.items() if key != "view"}, override({}, assignments))
    config = build(CacheConfig, override(values, assignments), "cache")
    drawn = [text for text in assignments if text.startswith(("view.", "view_seed="))]
    drawn += ["--recipe"] if arguments.recipe is not None else []
    if drawn and not config.views:
        raise InputError(f"cache: {drawn[0]} says how stored views are drawn, and none are: give --views as well")
    for name in config.teachers:
        check_model_name(name)
    from clipdistill.cache.fill import fill
    from clipdistill.runtime.progress import Meter

    with Meter("filling", enabled=not arguments.quiet) as meter:

        def told(done: int, total: int, rate: float) -> None:
            meter.set(done, total, f"{rate:.1f} images/s")
            if meter.due(10):
                meter.say(f"filling  {done}/{total} images  {rate:.1f} images/s  left {meter.left():.0f} s")

        report = fill(config, say=meter.say, progress=told)
    say = meter.say
    if report.samples:
        say(
            f"filled {report.samples} images in {report.seconds:.1f} s ({report.rate:.1f} images/s); {report.bad} "
            f"could not be read; {report.truncated} captions cut at the teacher's context length"
        )
    missing = len(report.store.missing_blocks())
    say(f"{config.out}: " + ("complete" if not missing else f"{missing} blocks of other shares are not filled here"))
    return 0


def _folders(words: list[str], least: int, usage: str) -> list[Path]:
    if len(words) < least:
        raise InputError(f"usage: clipdistill cache {usage}")
    return [Path(word) for word in words]


def _verify(words: list[str], arguments: argparse.Namespace) -> int:
    from clipdistill.cache.check import verify

    code = 0
    for folder in _folders(words, 1, "verify DIR"):
        report = verify(folder)
        for problem in report.problems:
            print(problem)
        state = "every byte is as it was written" if report.good else f"{len(report.problems)} damaged or foreign parts"
        if report.missing:
            state += f"; {report.missing} of {report.blocks} blocks are not filled"
        size = f"{report.blocks} blocks, {file_size(report.bytes)}, {report.invalid_samples} samples without image"
        print(f"{folder}: {size}: {state}")
        code = code or int(not report.good)
    return code


def _info(words: list[str], arguments: argparse.Namespace) -> int:
    from clipdistill.cache.fill import read_ledger
    from clipdistill.cache.store import CacheStore

    for folder in _folders(words, 1, "info DIR"):
        store = CacheStore(folder)
        manifest, missing = store.manifest, len(store.missing_blocks())
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(
            f"{folder}: {len(store.layout) - missing} of {len(store.layout)} blocks of {manifest.block} samples filled"
        )
        data, grown = manifest.data, len(manifest.segments) - 1
        print(f"  data      {data.name} ({data.path}): {data.samples} images, {data.captions} captions")
        print(f"            fingerprint {data.fingerprint[:16]}, captions {manifest.captions}, grown {grown} times")
        if manifest.synthetic is not None:
            print(f"  added     {manifest.synthetic.captions} captions")
        for number, teacher in enumerate(manifest.teachers):
            print(
                f"  teacher {number} {teacher.name}: {teacher.dim} dimensions, logit scale {teacher.logit_scale:.4g}, "
                f"{teacher.precision} forward, {teacher.transform.size} px, weights {teacher.weights[:16]}"
            )
            for tower, name in teacher.engines.items():
                cosine = teacher.agreement.get(tower, 0)
                print(f"            {tower} tower by {name}, cosine with torch at least {cosine:.7f}")
        policy = "" if manifest.view_policy is None else f": {manifest.view_policy.model_dump_json()}"
        print(f"  views     the evaluation view and {manifest.views} stored{policy}")
        share = file_size(size / manifest.data.samples)
        print(f"  size      {manifest.dtype}, {file_size(size)} on disk, {share} an image")
        print(f"  versions  {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}")
        bad = read_ledger(store)
        if bad:
            print(f"  without image: {len(bad)} (the first: {bad[0]['key']}, {bad[0]['reason']})")
    return 0


def _merge(words: list[str], arguments: argparse.Namespace) -> int:
    from clipdistill.cache.merge import merge

    out, *folders = _folders(words, 3, "merge OUT DIR DIR ...")
    store = merge(out, folders)
    missing = len(store.missing_blocks())
    print(
        f"{out}: {len(store)} samples, " + ("complete" if not missing else f"{missing} blocks are still to be filled")
    )
    return 0


def _export(words: list[str], arguments: argparse.Namespace) -> int:
    folder, out = _folders(words, 2, "export DIR OUT --data D")[:2]
    if arguments.data is None:
        raise InputError("cache export: name the data the cache was filled from with --data, whose tars set the names")
    from clipdistill.cache.check import require_data
    from clipdistill.cache.store import CacheStore
    from clipdistill.cache.tars import export_shards
    from clipdistill.data.open import open_pairs

    values = {"path": arguments.data, "split": arguments.split}
    source = open_pairs(
        build(CacheConfig, {"teacher": "-", "out": "-", "data": values}, "cache").data, default_split="train"
    )
    store = CacheStore(folder)
    require_data(store, source)
    written = export_shards(store, source, out)
    size = sum(path.stat().st_size for path in written)
    print(f"{out}: {len(written)} tars beside the data's, {file_size(size)}, {file_size(size / len(store))} an image")
    return 0
