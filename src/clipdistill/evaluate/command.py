"""`clipdistill eval`: retrieval, zero-shot and matching scores of models, as tables and as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from clipdistill.data.open import check_evaluated_name, is_labelled_name
from clipdistill.embed.names import add_engine, on_cluster
from clipdistill.errors import InputError
from clipdistill.models.names import check_model_name
from clipdistill.runs.folder import RunFolder
from clipdistill.runtime.console import say
from clipdistill.runtime.files import require_place, write_json
from clipdistill.statistics.protocol import RETRIEVAL_PROTOCOLS, retrieval_scoring
from clipdistill.statistics.scores import require_scores_place

if TYPE_CHECKING:
    from clipdistill.embed.encode import EncodedPairs


_KS = "1,5,10"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, on what, and how."""
    add = parser.add_argument
    what = "a run folder, a model folder or file, or a model name (ViT-B-16/laion400m_e32); several for one table"
    add("models", nargs="+", metavar="model", help=what)
    add(
        "--data",
        action="append",
        required=True,
        help="pairs, a labelled set or a benchmark, by path or name (`list datasets`); repeat for several",
    )
    add("--teacher", help="measure this model too and print what the student keeps of it")
    add(
        "--protocol",
        choices=RETRIEVAL_PROTOCOLS,
        default="standard",
        help="retrieval: all captions, or only the first of each image as CLIP-KD and CLIP-RD do (docs/protocols.md)",
    )
    add(
        "--score",
        metavar="WAY",
        help="retrieval: bsap, or bsap:FILE with a prompt a line, balances each image's scores by auxiliary prompts",
    )
    add("--split", help="split of the data (default: test, else val)")
    add("--k", default=_KS, help="the K of R@K, separated by commas")
    add("--templates", help="prompt templates: a set's name or a file (default: what fits the set)")
    add("--classes", help="file with the class names of a labelled set")
    add("--batch-size", type=int, default=256, help="images or captions a forward pass (default 256)")
    add("--workers", type=int, help="processes that decode images (default: measured)")
    add_engine(add)
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU when there is one)")
    add("--dtype", default="float32", help="float32, bfloat16 or float16")
    add("--strict-counts", action="store_true", help="refuse a published set that is not complete")
    add("--no-intervals", action="store_true", help="leave out the bootstrap intervals")
    add("--json", type=Path, help="write the scores here; per-query results go beside it as .npz")
    add(
        "--geometry",
        nargs="?",
        const="",
        metavar="FILE",
        help="describe the embedding space too (similarities, modality gap, alignment with --teacher); written here, "
        "or without a name into the run's folder as geometry.json, where reports draw it",
    )
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    models = arguments.models
    if twice := [name for i, name in enumerate(models) if name in models[:i]]:
        raise InputError(f"model '{twice[0]}' is named twice")
    if len(models) > 1 and arguments.geometry is not None:
        raise InputError("--geometry describes one model's embeddings: name one model")
    geometry_path = None if arguments.geometry is None else geometry_file(arguments.geometry, models[0])
    if arguments.json is not None:
        require_scores_place(arguments.json)
    if geometry_path is not None:
        require_place(geometry_path, "geometry", (b'"student"',))
        if arguments.json is not None and geometry_path in (arguments.json, arguments.json.with_suffix(".npz")):
            raise InputError(f"{geometry_path}: named for --json and for --geometry: give each a file of its own")
    _refuse_unused(arguments)
    if arguments.score is not None:
        retrieval_scoring(arguments.score)
    on_cluster(arguments.engine)
    for name in filter(None, (*models, arguments.teacher)):
        RunFolder(Path(name)).load_plugins()
        check_model_name(name)
    for name in arguments.data:
        check_evaluated_name(name)
    try:
        ks = tuple(int(k) for k in arguments.k.split(","))
    except ValueError as error:
        raise InputError(f"--k {arguments.k}: give whole numbers separated by commas, as in 1,5,10") from error
    if arguments.batch_size < 1 or (arguments.workers or 0) < 0:
        raise InputError("--batch-size must be at least 1 and --workers at least 0")
    from clipdistill.evaluate.evaluate import evaluate
    from clipdistill.runtime.distributed import ProcessGroup, is_main, world_size
    from clipdistill.runtime.machine import pick_device
    from clipdistill.statistics.scores import Scores

    embeddings: dict[tuple[str, str], EncodedPairs] = {}
    device = pick_device(arguments.device)
    scores = Scores()
    same = ("protocol", "split", "templates", "classes", "batch_size", "workers", "dtype", "strict_counts", "engine")
    with ProcessGroup(device):  # under torchrun the ranks share the work and the first one writes
        for model in models:
            measured = evaluate(
                model,
                arguments.data,
                teacher=None if len(scores) else arguments.teacher,
                ks=ks,
                device=device,
                intervals=not arguments.no_intervals,
                progress=not arguments.quiet,
                distributed=world_size() > 1,
                embeddings=None if geometry_path is None else embeddings,
                score=arguments.score,
                **{name: getattr(arguments, name) for name in same},
            )
            scores.add(measured if len(models) == 1 else measured.renamed("student", model))
        if not is_main():
            return 0
    if geometry_path is not None:
        write_geometry(embeddings, geometry_path)
    if arguments.json is not None:
        scores.save(arguments.json)
    teacher, listed = arguments.teacher, ", ".join(models)
    say(f"model: {listed}" if teacher is None else f"student: {listed}\nteacher: {teacher}")
    names = {"student": "score"} if teacher is None else {}
    if arguments.markdown:
        print("\n" + scores.to_markdown(names=names))
    else:
        scores.print(names=names)
    if len(scores.protocols()) > 1:
        overview = scores.overview(names)
        print("\n" + overview.markdown()) if arguments.markdown else overview.print()
    return 0


def _refuse_unused(arguments: argparse.Namespace) -> None:
    """Raise InputError for an option that none of the data sets could apply, and for a set that is named twice."""
    repeated = next((name for name in arguments.data if arguments.data.count(name) > 1), None)
    if repeated is not None:
        raise InputError(f"--data {repeated}: named twice; every set is measured once")
    labelled = [is_labelled_name(name) for name in arguments.data]
    for option, given, used, what in (
        ("templates", arguments.templates, any(labelled), "labelled sets"),
        ("classes", arguments.classes, any(labelled), "labelled sets"),
        ("k", arguments.k != _KS, not all(labelled), "image-caption pairs"),
        ("protocol", arguments.protocol != "standard", not all(labelled), "image-caption pairs"),
        ("score", arguments.score is not None, not all(labelled), "image-caption pairs"),
        ("geometry", arguments.geometry is not None, labelled.count(False) == 1, "one set of image-caption pairs"),
    ):
        if given and not used:
            raise InputError(f"--{option} is for {what}, and --data names {', '.join(arguments.data)}: leave it out")


def geometry_file(name: str, model: str) -> Path:
    """Where the geometry goes: the file named, or geometry.json in the folder of the run that is measured."""
    if name:
        return Path(name)
    if not (Path(model) / "run.json").is_file():
        raise InputError(f"--geometry: '{model}' is no run folder to write geometry.json into; name a file")
    return Path(model) / "geometry.json"


def write_geometry(embeddings: dict[tuple[str, str], EncodedPairs], path: Path) -> None:
    """Geometry of the student's embeddings as JSON, with the teacher's and their alignment where it was measured."""
    from clipdistill.evaluate.geometry import geometry

    sets = list(dict.fromkeys(name for _, name in embeddings))
    if len(sets) != 1:
        listed = ", ".join(sets) or "none"
        raise InputError(f"--geometry describes one set of image-caption pairs, and --data names {listed}")
    shape = geometry(embeddings["student", sets[0]], embeddings.get(("teacher", sets[0])))
    write_json(path, shape | {"data": sets[0]}, checked=True)
