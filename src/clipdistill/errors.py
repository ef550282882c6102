"""The errors a user is meant to read: one sentence each, with what is wrong, where, and what to do."""

from __future__ import annotations

import contextlib
import copyreg
import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

_USER = re.compile(r"(\b[a-zA-Z][\w+.-]+:)(?://[^\s/?#'\"]*@|/[^\s/?#'\":]*:[^\s/?#'\"]*@)")
"""User and password before the machine's name, as typed or as a path has them (with one slash)."""
_QUERY = re.compile(r"(\b[a-zA-Z][\w+.-]+:/[^\s?'\"]*)\?([^\s'\"]*)")
_SECRET = re.compile(r"(?:^|[&;])[^=&;]*(?:sig|token|secret|passw|pwd|credential|key|auth)[^=&;]*=", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """`text` with the URLs in it without user and password, and without a query that holds a signature or a key."""
    if ":/" not in text:
        return text
    text = _USER.sub(lambda found: found[1] + found[0][len(found[1]) :].partition("/")[1] * 2, text)
    return _QUERY.sub(lambda found: found[1] if _SECRET.search(found[2]) else found[0], text)


class ClipdistillError(Exception):
    """Base of every error this package raises on purpose. `exit_code` is what the command line returns.

    What it says holds no password of a URL.
    """

    exit_code = 1

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(without_secrets(each) if isinstance(each, str) else each for each in arguments))

    def __reduce__(self) -> tuple[Any, ...]:
        """How it reaches another process: an error whose constructor makes the sentence would be made with it again."""
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]

    def _render_traceback_(self) -> list[str]:
        """What notebooks show (IPython asks for it): the sentence, as on the command line."""
        return [f"{type(self).__name__}: {self}"]


class InputError(ClipdistillError, ValueError):
    """Something the user gave (a file, a key, a name, a value) cannot be used."""

    exit_code = 2


class MissingExtraError(InputError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}': install it with  pip install 'clipdistill[{extra}]'"
        )


def listed(text: str, where: str) -> list[str]:
    """The parts of a list that is written with commas. Raises InputError, beginning with `where`, for an empty one."""
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise InputError(f"{where}: a comma with nothing before or behind it: '{text:.200}'")
    return parts


@contextlib.contextmanager
def needing(package: str, extra: str, purpose: str) -> Iterator[None]:
    """Imports within: a missing one becomes a MissingExtraError."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(package, extra, purpose) from error


class BudgetError(ClipdistillError):
    """A stated budget (bad samples, skipped steps, lost accuracy) was exceeded, so the work stopped."""

    exit_code = 3


class StorageError(ClipdistillError):
    """The disk is full or refuses to be written; what was good on it is still good."""

    exit_code = 74


class RankError(ClipdistillError):
    """Another process of a distributed run has ended or does not answer."""

    exit_code = 76


class Preempted(ClipdistillError):
    """The run was asked to stop (SIGTERM, SIGINT, SIGUSR1, SIGHUP), saved its state, and can be resumed."""

    exit_code = 75


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# how libraries written in Rust (safetensors; the second form before its 0.5) report what the system said
_RUST = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)")


def storage_error(
    error: BaseException, advice: str = "make room and run the same command again"
) -> StorageError | None:
    """What to tell the user when `error` means that the disk is full or cannot be written; None for another error.

    A full disk is also found behind an error that was raised from the system's (`raise ... from`).
    """
    number = system_number(error)
    if number not in _FULL:
        cause = error.__cause__
        return storage_error(cause, advice) if cause is not None and system_number(cause) != errno.EROFS else None
    named = getattr(error, "filename", None)
    return StorageError(f"{f'{named}: ' if named else ''}{os.strerror(number)}: {advice}")


def system_number(error: BaseException) -> int | None:
    """The number (errno) of the system's error that this is, None for any other error."""
    if isinstance(error, OSError):
        return error.errno
    found = _RUST.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1] or found[2]) if found else None


_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? .*", re.IGNORECASE)


def worker_lost(error: BaseException, doing: str = "", advice: str = "") -> ClipdistillError | None:
    """What to tell the user when `error` means that a process preparing data has died; None for another error."""
    words = " ".join(str(error).split()) if isinstance(error, RuntimeError) else ""
    found = re.match(".*", words) if type(error).__name__ == "BrokenProcessPool" else _WORKER.search(words)
    if found is None:
        return None
    return ClipdistillError(
        f"{found[0][:120].rstrip('. ')}: a data worker died{doing}, usually for lack of memory: "
        f"{advice or 'use fewer workers and run the same command again'}"
    )


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of another library's error, or its kind when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def nearest(name: str, options: Iterable[str]) -> str:
    """' (did you mean 'x'?)' for the option nearest to `name`, or the list of options when none is near."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f"; known: {', '.join(options)}" if options else ""
