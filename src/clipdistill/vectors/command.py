"""`clipdistill embed`: embeddings of pictures or texts, by any model or export, into a file with their keys."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdistill.arguments import checked
from clipdistill.data.captions import require_legible
from clipdistill.data.files import data_path, is_remote
from clipdistill.embed.names import add_engine, on_cluster
from clipdistill.errors import InputError
from clipdistill.models.names import check_model_name
from clipdistill.runtime.files import is_inside, text_lines
from clipdistill.vectors.files import require_suffix

if TYPE_CHECKING:
    import torch

    from clipdistill.vectors.job import EmbedReport

_USAGE = """
clipdistill embed runs/x --data photographs --out photographs.npy        a folder, tars, a table, a labelled set
clipdistill embed runs/x --data captions.json --captions all --out captions.parquet     the captions of pairs
clipdistill embed onnx:export --texts queries.txt --out queries.safetensors             one text a line
clipdistill embed runs/x --classes flowers.tar --out classes.npy     a vector a class, from all its templates

clipdistill embed runs/x --data photographs --out vectors/photographs.lance                 a table of LanceDB

Each row has length 1 and its key: in .jsonl beside .npy, in columns of Parquet and LanceDB, in the tensor "keys" of
safetensors.
What was left out stands in OUT.json. Given again, the command goes on where it stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data or texts, and the file."""
    parser.epilog = _USAGE
    add = parser.add_argument
    add("model", metavar="MODEL", help="any name of a model: a run, an export (onnx:DIR), hf:..., towers:...")
    add("--data", help="pictures: a folder, tars, a table, pairs in any format, or a classification set")
    add("--texts", type=Path, help="instead of pictures: a file of texts, one a line, in UTF-8")
    add("--classes", metavar="SET", help="instead of pictures: the class vectors of a classification set")
    add("--templates", help="of --classes: a set's name or a file (default: what fits the set)")
    add("--captions", choices=("first", "all"), help="of --data: the captions instead of the pictures")
    add("--split", help="split of the data, where the format has splits")
    add("--out", type=Path, required=True, help="FILE.npy, FILE.parquet, FILE.safetensors or TABLE.lance")
    add("--batch-size", type=int, default=64, help="pictures or texts a forward pass (default 64)")
    add("--workers", type=int, default=0, help="processes that decode (default 0)")
    add("--dtype", default="float32", help="of the forward pass: float32, bfloat16, float16")
    add_engine(add)
    add("--part", type=int, default=4096, help="rows kept at a time, so that a kill loses fewer (default 4096)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU when there is one)")
    add("--quiet", action="store_true", help="no progress on the terminal")


def run(arguments: argparse.Namespace) -> int:
    """Embed and say what was written."""
    report = embed_to_file(
        arguments.model,
        arguments.data,
        arguments.out,
        texts=arguments.texts,
        classes=arguments.classes,
        templates=arguments.templates,
        captions=arguments.captions,
        split=arguments.split,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        dtype=arguments.dtype,
        engine=arguments.engine,
        part=arguments.part,
        device=arguments.device,
        progress=not arguments.quiet,
    )
    took = "was complete already" if report.known else f"in {report.seconds:.1f} s"
    print(f"{report.path}: {report.rows} rows of {report.width} numbers {took}")
    if report.found:
        print(report.found)
    if report.left_out:
        key, reason = report.left_out[0]
        print(f"left out: {len(report.left_out)} pictures that cannot be read (the first, {key}: {reason})")
    if report.truncated:
        print(f"{report.truncated} texts were cut at the model's context length")
    return 0


@checked
def embed_to_file(
    model: Any,
    data: Any = None,
    out: str | Path = "",
    *,
    texts: Any = None,
    classes: str | None = None,
    templates: str | None = None,
    captions: str | None = None,
    split: str | None = None,
    batch_size: int = 64,
    workers: int = 0,
    dtype: str = "float32",
    engine: str = "torch",
    part: int = 4096,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> EmbedReport:
    """Embeddings of pictures or texts into the file `out`, with their keys; called again, it goes on where it stopped.

    model: any name of a model, or a loaded one. data: the pictures: a name, with or without captions, an opened source,
    any object that `distill` takes, or a list of pictures (paths, bytes, PIL's, arrays). texts: instead of them a list
    of texts, or a file of one a line. classes: instead of them a classification set, of whose classes each gets one
    vector under its name, the mean over `templates` (a set's name or a file; None: what fits the set); these are made
    at once. captions: "first" or "all", the captions of `data` instead of its pictures. split: of data that has splits.
    out: FILE.npy (keys in FILE.jsonl), FILE.parquet, FILE.safetensors or TABLE.lance (a table of LanceDB). batch_size:
    pictures or texts a forward pass;
    workers: processes that decode; dtype: of the forward pass; engine: what runs the towers, as in `evaluate`;
    part: rows kept at a time; device: None is a GPU where there is one; progress: a bar on the error stream.

    Returns an EmbedReport: path, rows, width, left_out, truncated, found. Raises InputError for unusable input, a file
    of something else at `out`, and work begun with other settings. `read_embeddings` reads such a file.
    """
    out = Path(out)
    require_suffix(out)
    if sum(given is not None for given in (data, texts, classes)) != 1:
        raise InputError("embed: name either pictures (--data) or texts (--texts), or class names (--classes)")
    if templates is not None and classes is None:
        raise InputError("embed: --templates belongs to --classes")
    if captions is not None and data is None:
        raise InputError("embed: --captions belongs to --data")
    if batch_size < 1 or workers < 0 or part < 1:
        raise InputError("embed: batch size and part must be at least 1, and workers at least 0")
    on_cluster(engine)
    if isinstance(model, str | Path):
        check_model_name(str(model))
    given = _lines(Path(texts)) if isinstance(texts, str | Path) else texts
    for number, text in enumerate(given or (), 1):
        require_legible(text, f"embed: text {number}")
    source: Any = data
    if isinstance(data, str | Path) and not is_remote(str(data)) and is_inside(data_path(str(data)), out):
        raise InputError(f"{out}: lies in the folder of the data, which it would change: choose another place")
    if isinstance(data, str | Path):  # before torch is imported, so that a wrong name is told at once
        from clipdistill.data.mixture.pictures import open_pictures

        source = open_pictures(str(data), split=split, default_split="train")
    from clipdistill.data.objects import as_pairs, no_image
    from clipdistill.data.pairs import PairSource
    from clipdistill.models.load import as_model
    from clipdistill.vectors import job

    found = ""
    if classes is not None:
        source = None
    elif given is not None:
        source = job.TextList(list(given))
    else:
        source = source.tolist() if getattr(source, "ndim", 0) == 1 else source  # a column of a table
        plain = isinstance(source, list | tuple) and bool(source) and all(no_image(item) is None for item in source)
        if plain and captions is not None:
            raise InputError("embed: a list of pictures has no captions to embed")
        source = source if isinstance(source, PairSource) else as_pairs(_Pictures(source) if plain else source)
        found = source.problems.sentence(source.name)
        if captions is not None:
            if not source.captioned:
                raise InputError(f"{source.name}: has no captions to embed")
            source = job.CaptionList(source, 1 if captions == "first" else None)
    loaded = as_model(model, device)
    if classes is not None:
        from clipdistill.embed.encode import open_encoder
        from clipdistill.vectors.classes import classes_to_file

        encoder = open_encoder(loaded, engine=engine, batch_size=batch_size, dtype=dtype, progress=progress)
        return classes_to_file(encoder, classes, templates, out)
    report = job.embed_to_file(
        loaded, source, out, batch_size=batch_size, workers=workers, dtype=dtype, engine=engine, part=part,
        progress=progress,
    )  # fmt: skip
    return replace(report, found=found)


class _Pictures:
    """A list of pictures as pairs, under their paths or numbers; nobody reads the captions."""

    name = "pictures"

    def __init__(self, pictures: Sequence[Any]) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, i: int) -> dict[str, Any]:
        picture = self._pictures[i]
        return {"image": picture, "caption": "-", "key": picture if isinstance(picture, str | Path) else i}


def _lines(path: Path) -> list[str]:
    """The texts of a file, one a line; blank lines are an error, since rows would no longer be lines."""
    if not path.exists():
        raise InputError(f"{path}: no such file of texts, one a line; a text itself is written ['{path}'] in Python")
    lines = text_lines(path)
    if not lines:
        raise InputError(f"{path}: holds no text")
    blank = next((i for i, line in enumerate(lines, 1) if not line.strip()), None)
    if blank is not None:
        raise InputError(f"{path}: line {blank} is blank: take it out, so that row and line stay the same")
    return lines
