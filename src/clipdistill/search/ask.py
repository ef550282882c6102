"""`clipdistill.search(...)`: the index of a folder brought up to date, and a question answered from it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from clipdistill.arguments import checked
from clipdistill.data.files import read_image_file
from clipdistill.data.problems import BadSample
from clipdistill.embed.names import EngineName
from clipdistill.errors import InputError
from clipdistill.models.names import check_model_name
from clipdistill.runtime.console import Shown, TextTable, say
from clipdistill.runtime.files import is_inside, refuse_links
from clipdistill.runtime.signals import StopSignal
from clipdistill.search import HIDDEN

if TYPE_CHECKING:
    import torch

    from clipdistill.search.collection import Answer, Collection
    from clipdistill.search.encoder import SearchModel
    from clipdistill.search.store import SearchIndex
    from clipdistill.search.update import Update


@dataclass(frozen=True, repr=False)
class SearchResult(Shown):
    """What `search` found: one answer a model (the student first), each with its hits, best first.

    photographs: how many are in the index; left_out: file -> why it could not be read.
    """

    query: str
    answers: tuple[Answer, ...]
    photographs: int
    left_out: dict[str, str]

    def table(self) -> TextTable:
        """A row a rank; cosine and file of each model."""
        heads = [f"{answer.role} {what}" for answer in self.answers for what in ("score", "file")]
        table = TextTable(["rank", *heads], title=self.query, text=range(2, 2 * len(self.answers) + 1, 2))
        for rank in range(max(len(answer.hits) for answer in self.answers)):
            row = [str(rank + 1)]
            for answer in self.answers:
                hit = answer.hits[rank] if rank < len(answer.hits) else None
                row += ["", ""] if hit is None else [f"{hit.score:.3f}", hit.path]
            table.rows.append(row)
        return table

    def tables(self) -> list[TextTable]:
        return [self.table()]


@checked
def search(
    folder: str | Path,
    query: str | Path,
    *,
    model: str | Path,
    teacher: str | Path | None = None,
    top: int = 10,
    index: str | Path | None = None,
    index_kind: Literal["exact", "faiss", "usearch"] = "exact",
    update: bool = True,
    rehash: bool = False,
    batch_size: int = 64,
    workers: int = 4,
    device: str | torch.device | None = None,
    engine: EngineName = "torch",
    quiet: bool = True,
) -> SearchResult:
    """The photographs of a folder that are nearest to a query, after bringing the folder's index up to date.

    query: words, or the Path of a picture. model, teacher: names of models; both are asked where both are given.
    top: hits a model. index: folder of the index (None: inside `folder`); index_kind: how the nearest are found;
    update: look at the folder for new and changed files first; rehash: compare the content of every file.
    batch_size: photographs a forward pass; workers: threads that decode; device: None is a GPU where there is one;
    engine: what runs the models; quiet: no progress on the terminal.

    Returns a SearchResult: an answer a model with hits (path, cosine) and milliseconds. Raises InputError for a folder
    without photographs and for a query that cannot be read.
    """
    collection, answers = ask(
        query, top, folder=Path(folder), model=str(model), teacher=None if teacher is None else str(teacher),
        index=None if index is None else Path(index), index_kind=index_kind, update=update, rehash=rehash,
        batch_size=batch_size, workers=workers, device=device, engine=engine, quiet=quiet, out=sys.stderr,
    )  # fmt: skip
    return SearchResult(str(query), tuple(answers), len(collection), dict(collection.left_out))


def ask(query: str | Path | None, top: int, **settings: Any) -> tuple[Collection, list[Answer]]:
    """The collection of `settings` (those of `open_collection`) and its answers to words or the Path of a picture.

    Raises InputError for unusable settings and a picture that cannot be read, before a model is loaded.
    """
    if top < 1 or settings["batch_size"] < 1 or settings["workers"] < 1:
        raise InputError("search: top, batch size and workers must be at least 1")
    if not settings["folder"].is_dir():
        raise InputError(f"{settings['folder']}: no such folder")
    for name in filter(None, (settings["model"], settings["teacher"])):
        check_model_name(name)
    if not isinstance(query, Path):
        if query is not None and Path(query).suffix and Path(query).is_file():
            raise InputError(f"search: '{query}' is a file: to ask by a picture write --image, in Python Path(...)")
        collection = open_collection(**settings)
        return collection, [] if query is None else collection.ask_text(query, top)
    try:
        picture = read_image_file(query)
    except BadSample as error:
        raise InputError(f"{query}: {error.reason}") from error
    collection = open_collection(**settings)
    return collection, collection.ask_image(picture, top)


def open_collection(
    folder: Path,
    model: str,
    teacher: str | None,
    index: Path | None,
    index_kind: str,
    update: bool,
    rehash: bool,
    batch_size: int,
    workers: int,
    device: str | torch.device | None,
    engine: str,
    quiet: bool,
    out: TextIO,
) -> Collection:
    """Load the models and index the folder with each; the student first."""
    from clipdistill.search.collection import Collection
    from clipdistill.search.encoder import SearchModel
    from clipdistill.search.find import recall
    from clipdistill.search.store import open_index

    names = [("student", model)] + ([("teacher", teacher)] if teacher else [])
    place = index or folder / HIDDEN
    if index is None and place.is_symlink() and not is_inside(folder, place):
        raise InputError(f"{place}: is a link that leads out of the folder: remove it, or name the index with --index")
    refuse_links(place, "index")
    sides: list[tuple[SearchModel, SearchIndex]] = []
    unlisted: dict[str, str] = {}
    for role, name in names:
        searched = SearchModel(name, role, device, engine)
        found = open_index(place, dict(searched.description))
        for notice in found.notices:
            say(f"note: {notice}", out)
        if update:
            done = _update(found, searched, quiet, folder=folder, batch_size=batch_size, workers=workers, rehash=rehash)
            unlisted |= dict(done.unlisted)
            if not quiet:
                say(summary(done, searched), out)
        elif not found.entries:
            raise InputError(
                f"{place}: no index of the {role} {name} in there: leave --no-update out once, which makes it"
            )
        sides.append((searched, found))
    collection = Collection(folder, sides, index_kind, unlisted)
    if index_kind != "exact" and not quiet:
        for side in collection.sides:
            share = recall(side.finder, side.index)
            say(
                f"{side.model.role}: {index_kind} returns {share:.1%} of the exact ten nearest "
                "(up to 100 photographs of the index as queries)",
                out,
            )
    return collection


def _update(index: SearchIndex, model: SearchModel, quiet: bool, **settings: Any) -> Update:
    from clipdistill.runtime.progress import Meter
    from clipdistill.search.update import update

    with StopSignal() as signal, Meter(f"{model.role}: photographs", enabled=not quiet) as meter:
        return update(index, model=model, progress=meter.advance, stop=lambda: signal.received is not None, **settings)


def summary(done: Update, model: SearchModel) -> str:
    """One line on what the index holds and what was done."""
    parts = [f"{done.encoded:,} encoded ({done.rate:,.0f}/s on {model.device})"] if done.encoded else []
    parts += [f"{done.recognised:,} recognised by content"] if done.recognised else []
    parts += [f"{done.removed:,} removed"] if done.removed else []
    parts = parts or ["nothing new"]
    return f"{model.role} {model.name}: {done.photographs:,} photographs in the index; {', '.join(parts)}"
