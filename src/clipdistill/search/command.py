"""`clipdistill search`: index a folder of photographs, then ask it from the terminal or a local page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from clipdistill.data.problems import Problems
from clipdistill.embed.names import add_engine
from clipdistill.errors import InputError
from clipdistill.runtime.console import TextTable, say
from clipdistill.runtime.files import is_inside
from clipdistill.search import HIDDEN, KINDS
from clipdistill.search.ask import ask, open_collection
from clipdistill.search.photographs import printable

if TYPE_CHECKING:
    from clipdistill.search.collection import Answer, Collection

PORT, HOST = 8765, "127.0.0.1"
_LISTED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which photographs, which models, what to ask."""
    add = parser.add_argument
    add("folder", type=Path, help="folder of photographs, with its sub-folders")
    add("--model", required=True, help="a run folder, a model folder, or any model name: the student")
    add("--teacher", help="index and ask this model too and show both side by side")
    add("--query", help="what to look for, in words")
    add("--image", type=Path, help="look for photographs like this one")
    add("--top", type=int, default=10, help="how many to show (default: 10)")
    add("--page", action="store_true", help="serve a search page on this machine until Ctrl-C")
    add("--port", type=int, default=PORT, help=f"of the page; 0 takes a free one (default: {PORT})")
    add("--host", default=HOST, help="address the page listens on (default: this machine only)")
    add("--index", type=Path, help=f"where the index is kept (default: {HIDDEN} inside the folder)")
    add("--vectors", type=Path, metavar="OUT", help="write the vectors: .npy, .parquet, .safetensors, or TABLE.lance")
    add("--index-kind", choices=KINDS, default="exact", help="exact, or approximate with an optional package")
    add(
        "--no-update",
        dest="update",
        action="store_false",
        help="search the index as it is, without looking at the folder",
    )
    add("--rehash", action="store_true", help="compare the content of every file, also where size and time are equal")
    add("--batch-size", type=int, default=64, help="photographs a forward pass (default: 64)")
    add("--workers", type=int, default=4, help="threads that read and decode (default: 4)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU when there is one)")
    add_engine(add, cluster=False)
    add("--json", action="store_true", help="print the answer as JSON")
    add("--quiet", action="store_true", help="no progress bars, no summary of the index")


def run(arguments: argparse.Namespace) -> int:
    """Bring the index up to date, answer, say what was left out, serve."""
    if arguments.query is not None and arguments.image is not None:
        raise InputError("--query and --image are two questions: give one of them")
    if not 0 <= arguments.port <= 65535:
        raise InputError(f"--port must be between 0 and 65535, got {arguments.port}")
    if arguments.query is not None and not arguments.query.strip():
        raise InputError("the query is empty")
    for option, given, used, needed in (
        ("port", arguments.port != PORT, arguments.page, "--page"),
        ("host", arguments.host != HOST, arguments.page, "--page"),
        ("rehash", arguments.rehash, arguments.update, "an update, which --no-update leaves out"),
        ("json", arguments.json, arguments.query is not None or arguments.image is not None, "--query or --image"),
    ):
        if given and not used:
            raise InputError(f"--{option} goes with {needed}: leave it out, or give that as well")
    if arguments.vectors is not None:
        from clipdistill.vectors.files import require_room, require_suffix

        require_suffix(arguments.vectors)
        if is_inside(arguments.folder, arguments.vectors):
            raise InputError(f"{arguments.vectors}: lies in the folder of photographs: choose another place")
        if arguments.vectors.exists() or arguments.vectors.is_symlink():
            raise InputError(f"{arguments.vectors}: is there already: choose another place, or remove it")
        require_room(arguments.vectors)
    out = sys.stderr if arguments.json else sys.stdout
    settings = {name: getattr(arguments, name) for name in signature(open_collection).parameters.keys() - {"out"}}
    asked = arguments.query if arguments.image is None else arguments.image
    collection, answers = ask(asked, arguments.top, out=out, **settings)
    if asked is not None:
        if arguments.json:
            json.dump(as_json(arguments, collection, answers), sys.stdout, indent=1)
            print()
        else:
            print_answers(answers, collection, arguments.index_kind)
    if arguments.vectors is not None:
        from clipdistill.search.vectors import write_vectors

        say(f"{arguments.vectors}: {write_vectors(collection, arguments.vectors):,} vectors", out)
    if not arguments.quiet:
        print_left_out(collection.left_out, out)
    if arguments.page:
        from clipdistill.search.server import serve

        serve(collection, arguments.host, arguments.port, arguments.top, out)
    return 0


def print_left_out(left_out: dict[str, str], out: TextIO) -> None:
    """How many photographs are not in the index and why, and the first of them."""
    if not left_out:
        return
    found = Problems()
    for path, reason in left_out.items():
        found.add(reason, path)
    many = len(left_out) > 1
    why = f" ({found.summary()})" if len(found.counts) > 1 or len(left_out) > _LISTED else ""
    say(f"{len(left_out):,} file{'s' if many else ''} cannot be read and {'are' if many else 'is'} left out{why}:", out)
    for path, reason in list(left_out.items())[:_LISTED]:
        say(f"  {printable(path)}: {reason}", out)
    if len(left_out) > _LISTED:
        say(f"  (and {len(left_out) - _LISTED:,} more)", out)


def print_answers(answers: Sequence[Answer], collection: Collection, kind: str) -> None:
    """The hits as a table, one column group a model, and what each answer cost."""
    from clipdistill.search.collection import times_as_fast

    several = len(answers) > 1
    heads = [f"{answer.role} {what}" if several else what for answer in answers for what in ("score", "file")]
    table = TextTable(["rank", *heads], text=range(2, 2 * len(answers) + 1, 2))
    for rank in range(max(len(answer.hits) for answer in answers)):
        row = [str(rank + 1)]
        for answer in answers:
            for hit in answer.hits[rank : rank + 1] or (None,):
                row += [f"{hit.score:.3f}", printable(hit.path) + " *" * hit.shared] if hit else ["", ""]
        table.rows.append(row)
    table.print()
    for answer, side in zip(answers, collection.sides, strict=True):
        say(
            f"{answer.role} {answer.model}: query encoded in {answer.encode_ms:.1f} ms, "
            f"{len(side.index.entries):,} photographs searched in {answer.search_ms:.2f} ms ({kind})"
        )
        if answer.note:
            say(f"{answer.role}: {answer.note}")
    if several:
        student, teacher = answers
        shared = sum(hit.shared for hit in student.hits)
        ratio = times_as_fast(student, teacher)
        told = "who is faster cannot be told on this machine just now"
        if ratio is not None:
            told = f"the student answers {ratio:.1f} times as fast as the teacher"
        say(f"{told}; * {shared} of {len(student.hits)} photographs are found by both")


def as_json(arguments: argparse.Namespace, collection: Collection, answers: Sequence[Answer]) -> dict[str, Any]:
    """The answer for other programs."""
    return {
        "folder": str(arguments.folder),
        "query": arguments.query,
        "image": str(arguments.image) if arguments.image else None,
        "photographs": len(collection),
        "left_out": [{"file": path, "reason": reason} for path, reason in collection.left_out.items()],
        "answers": [
            {
                "role": answer.role,
                "model": answer.model,
                "encode_ms": round(answer.encode_ms, 4),
                "search_ms": round(answer.search_ms, 4),
                "note": answer.note,
                "hits": [{"rank": r + 1, "score": h.score, "file": h.path} for r, h in enumerate(answer.hits)],
            }
            for answer in answers
        ],
    }
