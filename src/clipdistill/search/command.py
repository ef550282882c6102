"""`clipdistill search`: index a folder of photographs, then ask it from the terminal or a local page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError
from clipdistill.models.names import check_model_name
from clipdistill.runtime.links import is_inside, refuse_links
from clipdistill.runtime.signals import StopSignal
from clipdistill.search.find import FINDERS, recall
from clipdistill.search.photographs import printable
from clipdistill.search.store import HIDDEN, Store, open_store

if TYPE_CHECKING:
    from clipdistill.search.collection import Answer, Collection
    from clipdistill.search.encoder import SearchModel
    from clipdistill.search.update import Update

PORT = 8765
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
    add("--host", default="127.0.0.1", help="address the page listens on (default: this machine only)")
    add("--index", type=Path, help=f"where the index is kept (default: {HIDDEN} inside the folder)")
    add("--index-kind", choices=tuple(FINDERS), default="exact", help="exact, or approximate with an optional package")
    add("--no-update", action="store_true", help="search the index as it is, without looking at the folder")
    add("--rehash", action="store_true", help="compare the content of every file, also where size and time are equal")
    add("--batch-size", type=int, default=64, help="photographs a forward pass (default: 64)")
    add("--workers", type=int, default=4, help="threads that read and decode (default: 4)")
    add("--device", help="cpu, cuda, cuda:1 (default: CUDA when there is one)")
    add("--json", action="store_true", help="print the answer as JSON")
    add("--quiet", action="store_true", help="no progress bars, no summary of the index")


def run(arguments: argparse.Namespace) -> int:
    """Bring the index up to date, answer, serve."""
    if arguments.query is not None and arguments.image is not None:
        raise InputError("--query and --image are two questions: give one of them")
    if arguments.top < 1 or arguments.batch_size < 1 or arguments.workers < 1:
        raise InputError("--top, --batch-size and --workers must be at least 1")
    if not 0 <= arguments.port <= 65535:
        raise InputError(f"--port must be between 0 and 65535, got {arguments.port}")
    if not arguments.folder.is_dir():
        raise InputError(f"{arguments.folder}: no such folder")
    for name in filter(None, (arguments.model, arguments.teacher)):
        check_model_name(name)
    picture = _read(arguments.image) if arguments.image is not None else None
    console = Console(stderr=arguments.json)
    collection = open_collection(arguments, console)
    if arguments.query is not None or picture is not None:
        if picture is not None:
            answers = collection.ask_image(picture, arguments.top)
        else:
            answers = collection.ask_text(arguments.query, arguments.top)
        if arguments.json:
            json.dump(as_json(arguments, collection, answers), sys.stdout, indent=1)
            print()
        else:
            print_answers(answers, collection, arguments.index_kind, console)
    if arguments.page:
        from clipdistill.search.server import serve

        serve(collection, arguments.host, arguments.port, arguments.top, console)
    return 0


def open_collection(arguments: argparse.Namespace, console: Console) -> Collection:
    """Load the models and index the folder with each; the student first."""
    from clipdistill.search.collection import Collection
    from clipdistill.search.encoder import SearchModel

    names = [("student", arguments.model)] + ([("teacher", arguments.teacher)] if arguments.teacher else [])
    index = arguments.index or arguments.folder / HIDDEN
    if arguments.index is None and index.is_symlink() and not is_inside(arguments.folder, index):
        raise InputError(f"{index}: is a link that leads out of the folder: remove it, or name the index with --index")
    refuse_links(index, "index")
    sides: list[tuple[SearchModel, Store]] = []
    listed: list[tuple[str, str]] = []
    for role, name in names:
        model = SearchModel(name, role, arguments.device)
        store = open_store(index, dict(model.description))
        for notice in store.notices:
            console.print(f"note: {notice}", markup=False, soft_wrap=True)
        if not arguments.no_update:
            done = _update(store, model, arguments, console)
            if not arguments.quiet:
                print_update(done, model, console)
                if done.bad + done.unlisted != listed:  # the second model usually meets the same files
                    listed = done.bad + done.unlisted
                    print_bad(done, console)
        elif not store.entries:
            raise InputError(
                f"{index}: no index of the {role} {name} in there: leave --no-update out once, which makes it"
            )
        sides.append((model, store))
    collection = Collection(arguments.folder, sides, arguments.index_kind)
    if arguments.index_kind != "exact" and not arguments.quiet:
        for side in collection.sides:
            share = recall(side.finder, side.store)
            console.print(
                f"{side.model.role}: {arguments.index_kind} returns {share:.1%} of the exact ten nearest "
                "(up to 100 photographs of the index as queries)"
            )
    return collection


def _update(store: Store, model: SearchModel, arguments: argparse.Namespace, console: Console) -> Update:
    from clipdistill.search.update import update

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    shown = Console(stderr=True)
    with StopSignal() as signal, Progress(*columns, console=shown, transient=True, disable=arguments.quiet) as bar:
        task = bar.add_task(f"{model.role}: photographs", total=None)
        return update(
            store,
            arguments.folder,
            model,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            rehash=arguments.rehash,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            stop=lambda: signal.received is not None,
        )


def print_update(done: Update, model: SearchModel, console: Console) -> None:
    """One line on what the index holds and what was done."""
    parts = [f"{done.encoded:,} encoded ({done.rate:,.0f}/s on {model.device})"] if done.encoded else []
    parts += [f"{done.recognised:,} recognised by content"] if done.recognised else []
    parts += [f"{done.removed:,} removed"] if done.removed else []
    parts = parts or ["nothing new"]
    line = f"{model.role} {model.name}: {done.photographs:,} photographs in the index; {', '.join(parts)}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_bad(done: Update, console: Console) -> None:
    """The files that could not be read (the first of many), and the folders that could not be listed."""
    if done.bad:
        many = len(done.bad) > 1
        line = f"{len(done.bad):,} file{'s' if many else ''} cannot be read and {'are' if many else 'is'} left out:"
        console.print(line, highlight=False)
    for path, reason in [*done.bad[:_LISTED], *done.unlisted]:
        console.print(f"  {printable(path)}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if len(done.bad) > _LISTED:
        console.print(f"  (and {len(done.bad) - _LISTED:,} more files)", highlight=False)


def print_answers(answers: Sequence[Answer], collection: Collection, kind: str, console: Console) -> None:
    """The hits as a table, one column group a model, and what each answer cost."""
    several = len(answers) > 1
    longest = [max(len(printable(hit.path)) for hit in answer.hits) for answer in answers]
    width = sum(longest) + 24 * len(answers)
    if not console.is_terminal:  # a pipe or a file has no width
        console = Console(file=console.file, width=max(width, console.width))
    if width <= console.width:
        console.print(_table(answers))
    else:
        for answer in answers:
            console.print(_table([answer], answer.role if several else None))
    for answer, side in zip(answers, collection.sides, strict=True):
        console.print(
            f"{answer.role} {answer.model}: query encoded in {answer.encode_ms:.1f} ms, "
            f"{len(side.store.entries):,} photographs searched in {answer.search_ms:.2f} ms ({kind})",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        if answer.cut:
            console.print(f"{answer.role}: the query is longer than the model reads; its end was not used")
    if several:
        from clipdistill.search.collection import times_as_fast

        student, teacher = answers
        shared = sum(hit.shared for hit in student.hits)
        ratio = times_as_fast(student, teacher)
        told = "who is faster cannot be told on this machine just now"
        if ratio is not None:
            told = f"the student answers {ratio:.1f} times as fast as the teacher"
        console.print(
            f"{told}; * {shared} of {len(student.hits)} photographs are found by both", highlight=False, soft_wrap=True
        )


def _table(answers: Sequence[Answer], title: str | None = None) -> Table:
    """Rank, score and file of each answer's hits; a star marks what both models found."""
    several = len(answers) > 1
    table = Table(show_edge=False, pad_edge=False, title=title, title_justify="left")
    table.add_column("rank", justify="right")
    for answer in answers:
        table.add_column(f"{answer.role} score" if several else "score", justify="right")
        table.add_column(f"{answer.role} file" if several else "file", overflow="fold")
    for rank in range(max(len(answer.hits) for answer in answers)):
        cells = [Text(str(rank + 1))]
        for answer in answers:
            hit = answer.hits[rank] if rank < len(answer.hits) else None
            cells.append(Text(f"{hit.score:.3f}" if hit else ""))
            cells.append(Text(f"{printable(hit.path)}{' *' if hit.shared else ''}" if hit else ""))
        table.add_row(*cells)
    return table


def as_json(arguments: argparse.Namespace, collection: Collection, answers: Sequence[Answer]) -> dict[str, Any]:
    """The answer for other programs."""
    return {
        "folder": str(arguments.folder),
        "query": arguments.query,
        "image": str(arguments.image) if arguments.image else None,
        "photographs": len(collection),
        "answers": [
            {
                "role": answer.role,
                "model": answer.model,
                "encode_ms": round(answer.encode_ms, 4),
                "search_ms": round(answer.search_ms, 4),
                "hits": [{"rank": r + 1, "score": h.score, "file": h.path} for r, h in enumerate(answer.hits)],
            }
            for answer in answers
        ],
    }


def _read(path: Path) -> bytes:
    from clipdistill.data.files import read_image_file

    try:
        return read_image_file(path)
    except BadSample as error:
        raise InputError(f"{path}: {error.reason}") from error


class Rate(ProgressColumn):
    """Photographs a second, in the progress bar."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")
