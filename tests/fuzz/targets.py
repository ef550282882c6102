"""What is fuzzed: each target opens one input as its reader would and checks what must hold whatever the input is.

A target may raise InputError, BadSample or BudgetError (the input is refused) and nothing else; Broken says that a
promise about good samples was not kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipdistill.data import captions as caption_rules
from clipdistill.data.images import decode
from clipdistill.data.labelled import LabelledSource, read_class_file
from clipdistill.data.ledger import BadSampleLedger
from clipdistill.data.objects import as_pairs
from clipdistill.data.open import is_labelled_name, open_labelled, open_pairs
from clipdistill.data.pairs import BadSample, DataConfig, PairSource
from clipdistill.data.views import EVALUATION_VIEW, ImageSpec, View, ViewPolicy, render_pixels, sample_view
from clipdistill.errors import InputError
from tests.fuzz import seeds
from tests.fuzz.mutate import Repair, mangle_json, repair_png, repair_tar

PIXELS = 1_000_000
_SPEC = ImageSpec(size=16)
_GOOD = seeds.good_images()
_GOOD_PIXELS = {name: np.asarray(decode(data)) for name, data in _GOOD.items()}


class Broken(AssertionError):
    """Something that must hold for every input does not."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


@dataclass(frozen=True)
class Target:
    """seeds: good inputs; run(data, folder): tries one, in a folder that is empty but for the good images; words: what
    the format is made of; repairs: what keeps a mangled file plausible; structured: mutations that know the format;
    generate: valid but strange inputs; weight: share of the tries."""

    name: str
    seeds: Sequence[bytes]
    run: Callable[[bytes, Path], None]
    words: Sequence[bytes] = ()
    repairs: Sequence[Repair] = ()
    structured: Sequence[Callable[[bytes, random.Random], bytes]] = ()
    generate: Callable[[random.Random], bytes] | None = None
    weight: int = 10


# --- what holds for every opened source ------------------------------------------------------------------------------


def check_text(text: str, what: str) -> None:
    require(isinstance(text, str), f"{what} is {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Broken(f"{what} is not valid Unicode: {text!r:.80}") from None


def check_pairs(source: PairSource, clean: bool = True) -> None:
    """Keys unique, captions clean, every image a picture or a BadSample, nothing lost on the way to a worker."""
    keys = [source.key(i) for i in range(len(source))]
    require(len(keys) > 0, "an empty source")
    require(len(set(keys)) == len(keys), "keys repeat")
    for key, i in zip(keys, range(min(len(keys), 20))):
        check_text(key, "key")
        texts = source.captions(i)
        require(len(texts) > 0, f"'{key}' has no captions")
        for text in texts:
            check_text(text, "caption")
            require(text != "", "an empty caption")
            if clean:
                check_caption(text)
        check_image(source, i)
        source.shard_of(key)
    require(len(source.fingerprint()) == 64, "fingerprint")
    source.problems.summary()


def check_caption(text: str) -> None:
    check_text(text, "caption")
    require(text != "" and text == text.strip() and len(text) <= caption_rules.LONGEST, f"caption {text!r:.80}")
    require(unicodedata.is_normalized("NFC", text), "caption not in NFC")
    require(not any(unicodedata.category(c) == "Cc" for c in text), "control character in a caption")


def check_image(source: PairSource | LabelledSource, i: int) -> None:
    try:
        picture = source.image(i)
    except BadSample as error:
        check_reason(error)
    else:
        require(picture.mode == "RGB" and min(picture.size) > 0, f"picture {picture.mode} {picture.size}")


def check_reason(error: BadSample) -> None:
    require(bool(error.reason) and "\n" not in error.reason, f"reason {error.reason!r}")


def check_good(source: PairSource, captions: dict[str, tuple[str, ...]], prefix: bool = False) -> None:
    """The good samples are there with their captions (`prefix`: at least these, first) and pixels."""
    places = {source.key(i): i for i in range(len(source))}
    for key, expected in captions.items():
        require(key in places, f"the good sample '{key}' is gone")
        found = source.captions(places[key])
        found = found[: len(expected)] if prefix else found
        require(found == expected, f"the good sample '{key}' has the captions {found}")
        name = key.rsplit("/", 1)[-1]
        if name in _GOOD:
            require(
                np.array_equal(np.asarray(source.image(places[key])), _GOOD_PIXELS[name]), f"other pixels in '{key}'"
            )


# --- targets ---------------------------------------------------------------------------------------------------------


def run_image(data: bytes, folder: Path) -> None:
    picture = decode(data, max_pixels=PIXELS)
    require(picture.mode == "RGB" and 0 < picture.width * picture.height <= PIXELS, f"{picture.mode} {picture.size}")
    require(not picture.info, f"information left: {list(picture.info)}")
    again = decode(data, max_pixels=PIXELS)
    require(again.tobytes() == picture.tobytes(), "two decodings differ")
    reduced = decode(data, max_pixels=PIXELS, at_least=8)
    size = reduced.info.get("source_size", reduced.size)
    require(size == picture.size, f"reduced decoding says {size}, full {picture.size}")
    rng = np.random.default_rng(len(data))
    view = sample_view(ViewPolicy(kind="crop", flip=0.5), *size, rng)
    for image, drawn, exact in (
        (picture, EVALUATION_VIEW, True),
        (reduced, EVALUATION_VIEW, False),
        (reduced, view, False),
        (picture, view, True),
    ):
        pixels = render_pixels(image, drawn, _SPEC, exact=exact)
        require(pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8, f"rendered {pixels.shape} {pixels.dtype}")


def run_tar(data: bytes, folder: Path) -> None:
    shards = folder / "shards"
    shards.mkdir()
    good = seeds.tar([(f"g.{end}", c) for end, c in (("jpg", _GOOD["a.jpg"]), ("txt", b"a good one"))])
    (shards / "good.tar").write_bytes(good)
    (shards / "spoiled.tar").write_bytes(data)
    config = DataConfig(path=str(shards), max_pixels=PIXELS)
    source, again = open_pairs(config), open_pairs(config)  # the second time from the remembered index
    check_pairs(source)
    require(again.fingerprint() == source.fingerprint(), "the remembered index differs")
    require(again.problems.counts == source.problems.counts, "the remembered problems differ")
    check_good(source, {"good/g": ("a good one",)})
    require(source.image_bytes(0) == _GOOD["a.jpg"], "other bytes in the good shard")


def run_json(data: bytes, folder: Path) -> None:
    (folder / "data.json").write_bytes(data)
    for split in (None, "all"):
        check_pairs(open_pairs(DataConfig(path=str(folder / "data.json"), max_pixels=PIXELS, split=split)))


def run_json_tail(data: bytes, folder: Path) -> None:
    """Spoiled entries behind good ones leave those alone."""
    try:
        tail = json.loads(data)
    except (ValueError, RecursionError):
        return
    entries = tail.get("images") if isinstance(tail, dict) else None
    if not isinstance(entries, list):
        return
    rows = [{"filename": n, "sentences": [{"raw": f"good {n}"}]} for n in seeds.GOOD]
    (folder / "data.json").write_text(json.dumps({"images": [*rows, *entries]}))
    source = open_pairs(DataConfig(path=str(folder / "data.json"), split="all", max_pixels=PIXELS))
    check_pairs(source)
    check_good(source, {n: (f"good {n}",) for n in seeds.GOOD}, prefix=True)


def run_table(data: bytes, folder: Path) -> None:
    (folder / "data.csv").write_bytes(data)
    for missing in ("error", "skip"):
        config = DataConfig(path=str(folder / "data.csv"), missing_captions=missing, max_pixels=PIXELS)
        check_pairs(open_pairs(config, default_split="train"))


def run_table_tail(data: bytes, folder: Path) -> None:
    head = b"filepath,title\n" + b"".join(b"%s,good %s\n" % (n.encode(), n.encode()) for n in seeds.GOOD)
    (folder / "data.csv").write_bytes(head + data.partition(b"\n")[2])
    config = DataConfig(path=str(folder / "data.csv"), missing_captions="skip", separator=",", max_pixels=PIXELS)
    source = open_pairs(config)
    check_pairs(source)
    check_good(source, {n: (f"good {n}",) for n in seeds.GOOD}, prefix=True)


def run_parquet(data: bytes, folder: Path) -> None:
    (folder / "data.parquet").write_bytes(data)
    config = DataConfig(path=str(folder / "data.parquet"), missing_captions="skip", max_pixels=PIXELS)
    check_pairs(open_pairs(config, default_split="train"))


def run_folder(data: bytes, folder: Path) -> None:
    """A folder of images with captions, one pair spoiled, both ways."""
    text, _, image = data.partition(b"\0\0--\0\0")
    (folder / "a.txt").write_bytes(b"good a\n")
    (folder / "b.txt").write_bytes(text)
    (folder / "x.jpg").write_bytes(image)
    (folder / "x.txt").write_bytes(b"a broken picture\n")
    source = open_pairs(DataConfig(path=str(folder), max_pixels=PIXELS))
    check_pairs(source)
    check_good(source, {"a.jpg": ("good a",)})


def run_caption(data: bytes, folder: Path) -> None:
    for value in (
        data,
        data.decode("utf-8", "replace"),
        data[: len(data) // 2 * 2].decode("utf-16-le", "surrogatepass"),
    ):
        cleaned, notes = caption_rules.clean(value)
        if cleaned:
            check_caption(cleaned)
        require(caption_rules.clean(cleaned)[0] == cleaned, "cleaning twice changes something")
        require(len(set(notes)) == len(notes), "notes repeat")
        caption_rules.is_missing(value)


def check_labelled(source: LabelledSource) -> None:
    require(len(source) > 0, "an empty set")
    for i in range(min(len(source), 20)):
        require(0 <= source.label(i) < len(source.class_names), "a label without a name")
        check_text(source.key(i), "key")
        check_image(source, i)
    for name in source.class_names:
        check_text(name, "class name")
    require(len(source.fingerprint()) == 64, "fingerprint")
    source.deviation()


def run_labelled_tar(data: bytes, folder: Path) -> None:
    (folder / "data.tar").write_bytes(data)
    (folder / "classes.txt").write_text("cat\ndog\n")
    is_labelled_name(str(folder / "data.tar"))
    check_labelled(open_labelled(folder / "data.tar", max_pixels=PIXELS))


def run_npz(data: bytes, folder: Path) -> None:
    (folder / "data.npz").write_bytes(data)
    is_labelled_name(str(folder / "data.npz"))
    check_labelled(open_labelled(folder / "data.npz", max_pixels=PIXELS))


def run_classes(data: bytes, folder: Path) -> None:
    for suffix in (".json", ".txt"):
        path = folder / f"classes{suffix}"
        path.write_bytes(data)
        found = read_class_file(path, wnids=suffix == ".json")
        require(len(found) > 0, "no classes")
        for name in found:
            check_text(name, "class name")
        for kind in ("cat", "dog"):
            (folder / "set" / kind).mkdir(parents=True, exist_ok=True)
            (folder / "set" / kind / "a.jpg").write_bytes(_GOOD["a.jpg"])
        check_labelled(open_labelled(folder / "set", classes=path))


def run_index(data: bytes, folder: Path) -> None:
    """A spoiled index of a shard in the user's cache folder costs a new scan, or bad samples, nothing worse."""
    path = folder / "s.tar"
    path.write_bytes(seeds.tar(seeds.pair_members()))
    os.utime(path, (1, 1))
    open_pairs(str(path))
    (remembered,) = Path(os.environ["CLIPDISTILL_CACHE"]).rglob("*.npz")
    with np.load(remembered) as stored:
        arrays = {name: stored[name] for name in stored.files}
    rng = random.Random(data)
    for name in rng.sample(sorted(arrays), rng.randrange(1, 3)):
        array = np.array(arrays[name])
        if array.dtype.kind in "iu" and array.size:
            value = rng.choice((-1, 0, 1, 3, 99, 127, 1 << 20, 1 << 40, (1 << 63) - 1, -(1 << 63)))
            array.flat[rng.randrange(array.size)] = np.int64(value).astype(array.dtype)  # its low bits
        arrays[name] = array[: rng.randrange(array.size + 1)] if array.ndim and rng.random() < 0.3 else array
    if rng.random() < 0.3:
        arrays["problems"] = np.array(data.decode("utf-8", "replace"))
    with remembered.open("wb") as file:
        np.savez(file, **arrays)
    if rng.random() < 0.2:
        remembered.write_bytes(data)
    check_pairs(open_pairs(DataConfig(path=str(path), max_pixels=PIXELS)), clean=False)


def run_view(data: bytes, folder: Path) -> None:
    """A stored view (a cache may come from elsewhere) is rendered or refused."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    view = View.from_json(values)
    require(View.from_json(view.to_json()) == view or "nan" in str(view), "a view is not what it was stored as")
    for exact in (True, False):
        render_pixels(Image.fromarray(_GOOD_PIXELS["a.jpg"]), view, _SPEC, exact=exact)


def run_name(data: bytes, folder: Path) -> None:
    """Any name of a data set; those of the hub are left out, they would ask the network."""
    name = data.decode("utf-8", "surrogateescape").replace("HERE", str(folder))
    if name.startswith(("hf:", "torchvision:")) or name.lstrip().startswith(("/", "~", ".")):
        return
    is_labelled_name(name)
    for opened in (open_pairs, open_labelled):
        try:
            source: Any = opened(name)
        except (ValueError, BadSample) as error:
            if isinstance(error, UnicodeError) or type(error) is ValueError:
                raise
        else:
            require(len(source) > 0, "an empty source")
            source.key(0)


def _json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def run_ledger(data: bytes, folder: Path) -> None:
    path = folder / "bad_samples.jsonl"
    path.write_bytes(data)
    ledger = BadSampleLedger(path, 0.5, lambda key: None)
    ledger.record([("k\udcff\n", "empty image file"), ("k", "corrupt image: x")], 100)
    with contextlib.suppress(InputError):
        ledger.restore(_json_or_none(data))
    lines = path.read_bytes()[len(data) :].decode().strip("\n").split("\n")
    for line in lines:
        if line:
            require(set(json.loads(line)) >= {"key", "reason"}, f"line {line!r:.80}")


def run_object(data: bytes, folder: Path) -> None:
    """An object of a user's program that gives whatever JSON can say, beside two good items."""
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError):
        return
    good = [(_GOOD[name], f"good {name}") for name in ("a.jpg", "b.png")]
    source = as_pairs([*good, *(rows if isinstance(rows, list) else [rows])])
    check_pairs(source)
    check_good(source, {"0": ("good a.jpg",), "1": ("good b.png",)})
    require(
        len(source) + source.problems.dropped == 2 + (len(rows) if isinstance(rows, list) else 1), "uncounted items"
    )


def run_any(data: bytes, folder: Path) -> None:
    """A file of any content under any suffix."""
    suffix = (".csv", ".json", ".tar", ".parquet", ".npz", ".txt", "")[len(data) % 7]
    path = folder / f"thing{suffix}"
    path.write_bytes(data)
    is_labelled_name(str(path))
    for opened in (open_pairs, open_labelled):
        try:
            source: Any = opened(str(path))
        except ValueError as error:
            if isinstance(error, UnicodeError) or type(error) is ValueError:
                raise
        else:
            require(len(source) > 0, "an empty source")


def targets() -> list[Target]:
    """All of them."""
    pictures = seeds.images()
    image_words = (
        b"\xff\xd8", b"\xff\xd9", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xdb", b"\xff\xe1", b"Exif\0\0", b"IHDR",
        b"IDAT", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"iCCP", b"IEND", b"GIF89a", b"RIFF", b"WEBP", b"VP8X", b"II*\0",
        b"MM\0*", b"BM", b"P6\n", b"P5 9 9 255\n", b"ftypavif", b"\xff\xe2MPF\0", b"II+\0", b"P7\n",
    )  # fmt: skip
    tar_words = (b"ustar\0" + b"00", b"ustar  \0", b".jpg\0", b".txt\0", b".json\0", b"././@LongLink\0", b"11 path=x\n",
                 b"\x80\xff\xff", b"\xff\xff\xff", b"77777777777", b"20 GNU.sparse.a=bb\n", b"../",
                 b"12 size=999\n")  # fmt: skip
    json_words = (
        b'"images"',
        b'"sentences"',
        b'"raw"',
        b"null",
        b"NaN",
        b"1e999",
        b"[[",
        b"{}",
        b'"\\ud800"',
        b"\\u0000",
    )
    table_words = (b'"', b'""', b"\n", b"\r", b",", b"\t", b"filepath", b"title", b"split", b"a.jpg", b"\0", b"nan",
                   b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"b.png,x\n")  # fmt: skip
    folder_seeds = [b"one\ntwo\n\0\0--\0\0" + data for data in pictures[:12]]
    name_seeds = [
        b"scenes:val", b"scenes?size=3&seed=1", b"HERE/{0..3}.tar", b"HERE/a.jpg", b"HERE", b"s3://x",
        b"HERE/a.jpg:val", b"{a,b}{0..2}", b"imagenet@HERE", b"scenes:zeroshot?per_class=1", b"scenes:train?pixels=64",
    ]  # fmt: skip
    name_words = (
        b"{",
        b"}",
        b"..",
        b",",
        b"0",
        b"99999999",
        b":",
        b"?",
        b"=",
        b"&",
        b"size",
        b"@",
        b"\xff",
        b"\0",
        b"/",
    )
    views = [
        b'[[1, 2, 5, 6], true, [["brightness", 1.2], ["rotate", 10.0]]]', b"[null, false, []]",
        b'[null, 0, [["solarize", 3], ["posterize", 4], ["hue", 0.1], ["shear_x", 0.2], ["translate_y", 0.3]]]',
        b'[[0, 0, 14, 20], false, [["sharpness", 2], ["equalize", 0], ["autocontrast", 0]]]',
    ]  # fmt: skip
    everything = [
        *seeds.tables(), seeds.karpathy(), seeds.coco(), *seeds.parquets(), *seeds.pair_tars(), seeds.npz(),
        seeds.labelled_tar(), *pictures[:3], b"\x1f\x8b", b"PK\x03\x04",
    ]  # fmt: skip
    words = (*image_words, *tar_words, *json_words, *table_words)
    json_seeds = (seeds.karpathy(), seeds.coco())
    return [
        Target("image", pictures, run_image, image_words, (repair_png,), weight=40),
        Target("tar", seeds.pair_tars(), run_tar, tar_words, (repair_tar,), generate=seeds.random_tar, weight=15),
        Target("json", json_seeds, run_json, json_words, structured=(mangle_json,)),
        Target("json-tail", json_seeds, run_json_tail, json_words, structured=(mangle_json,)),
        Target("table", seeds.tables(), run_table, table_words),
        Target("table-tail", seeds.tables(), run_table_tail, table_words),
        Target("parquet", seeds.parquets(), run_parquet, generate=seeds.random_parquet),
        Target("folder", folder_seeds, run_folder, (*image_words, *table_words), weight=5),
        Target("caption", [t.encode() for t in _CAPTIONS], run_caption, [w.encode() for w in _PIECES], weight=15),
        Target("labelled-tar", [seeds.labelled_tar()], run_labelled_tar, tar_words, (repair_tar,),
               generate=seeds.random_tar, weight=6),
        Target("npz", [seeds.npz(), seeds.npz(filenames=None)], run_npz, (b"PK\x01\x02", b"{'descr': '|O'", b"'<U9'"),
               generate=seeds.random_npz),
        Target("classes", seeds.class_files(), run_classes, json_words, structured=(mangle_json,), weight=4),
        Target("index", [b"", b'{"counts": {}, "rows": [], "dropped": 0}'], run_index, structured=(mangle_json,),
               weight=4),
        Target("view", views, run_view, json_words, structured=(mangle_json,)),
        Target("name", name_seeds, run_name, name_words),
        Target("ledger", [b'{"key": "a", "reason": "b"}\n'], run_ledger, json_words, structured=(mangle_json,),
               weight=3),
        Target("object", [b'[["a.jpg", "x"], {"image": "a.jpg", "captions": ["y"], "key": "k"}, {"text": 3}, [1]]'],
               run_object, json_words, structured=(mangle_json,)),
        Target("any", everything, run_any, words, (repair_tar,), weight=6),
    ]  # fmt: skip


_CAPTIONS = ("a red bird on a branch", "nan", "", "caf\u00e9 e\u0301", "\u0645\u0631\u062d\u0628\u0627",
             "\U0001f468\u200d\U0001f469\u200d\U0001f467",
             "x" * 2100, "\u1100\u1161\u11a8", "\ufdfa" * 300, "a\u0300\u0301" * 700)  # fmt: skip
_PIECES = ("\u0300", "\u200d", "\ufeff", "\u2028", "\u00a0", "\u202e", "\x00", "\x7f", "\ufffe", "\U0010ffff", "\u0344",
           "\u1e9b\u0323", "NaN", "\t", "\u3000", "\x85", "\x1c", "\U000e0001")  # fmt: skip
