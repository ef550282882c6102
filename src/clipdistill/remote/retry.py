"""What goes wrong on the way to an object, and how often it is tried again before it is told in one sentence."""

from __future__ import annotations

import http.client
import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from clipdistill.errors import ClipdistillError, InputError, first_line, without_secrets

T = TypeVar("T")
_log = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_ASKED = 0.5, 16.0, 60.0  # seconds
SLOWEST = 8192
"""Bytes a second below which an answer counts as stalled."""


class RemoteError(ClipdistillError):
    """An object of a run cannot be read any more, or is another one: the run stops and can be continued."""

    exit_code = 69

    def __init__(self, message: str) -> None:
        # a worker process of torch sends its traceback as the message: the sentence is its end
        if message.startswith("Caught RemoteError"):
            message = message.rstrip().rpartition("RemoteError: ")[2]
        super().__init__(message)


class AccessError(ClipdistillError):
    """A store does not let us read what was named."""

    exit_code = 2


class Refused(Exception):
    """The store does not let us (401, 403, no credentials)."""


class Changed(Exception):
    """The object is not the one that was opened."""


class Temporary(Exception):
    """Anything that may pass: an overloaded server, a cut connection. after: seconds that the server asks for."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class NoRanges(Exception):
    """The server sends objects whole only."""


def setting(name: str, default: float, least: float) -> float:
    """A number from the environment. Raises InputError for what is none, or too small."""
    text = os.environ.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = -1.0
    if not least <= value < 1e6:
        raise InputError(f"{name}={text}: must be a number of at least {least:g}")
    return value


def time_limit() -> float:
    """Seconds without an answer after which a request has failed."""
    return setting("CLIPDISTILL_REMOTE_TIMEOUT", 20, 0.01)


def attempts() -> int:
    """How often one thing is tried."""
    return int(setting("CLIPDISTILL_REMOTE_ATTEMPTS", 6, 1))


def attempted(url: str, call: Callable[[], T], *, opening: int = 0) -> T:
    """`call()`, tried again with growing pauses.

    opening: where nothing has been read of the object yet, the tries after which a missing or refused one is told
    (FileNotFoundError, InputError). Raises RemoteError when all tries are spent.
    """
    name, most, begun = without_secrets(url), attempts(), time.monotonic()
    number, wait = 0, _FIRST_WAIT
    while True:
        try:
            return call()
        except NoRanges:
            raise
        except (OSError, http.client.HTTPException, Refused, Changed, Temporary) as error:
            number += 1
            settled = opening > 0 and isinstance(error, FileNotFoundError | Refused)
            if number >= (min(most, opening) if settled else most):
                raise _final(name, error, number, time.monotonic() - begun, settled) from error
            pause = wait * random.uniform(0.5, 1.0)
            if isinstance(error, Temporary):
                pause = max(pause, min(error.after, _LONGEST_ASKED))
            if number == 1 and not settled and most > 1:
                _log.warning("%s: %s, trying again", name, _words(error))
            time.sleep(pause)
            wait = min(2 * wait, _LONGEST_WAIT)


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {time_limit():g} s"
    if isinstance(error, FileNotFoundError):
        return "it is not there (404)"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer was cut short"
    return first_line(error)


def _final(name: str, error: Exception, number: int, seconds: float, settled: bool) -> Exception:
    tried = f"{number} attempts in {seconds:.0f} s"
    if isinstance(error, FileNotFoundError) and settled:
        return FileNotFoundError(name)
    if isinstance(error, Refused) and settled:
        return AccessError(f"{name}: access is refused ({_words(error)}): see docs/remote.md for where credentials go")
    if isinstance(error, Changed):
        return RemoteError(
            f"{name} changed since it was opened ({error}; {tried}): a run reads one version of its data, so put the "
            "old object back, or start anew"
        )
    gone = "gone since it was opened: " if isinstance(error, FileNotFoundError) else ""
    return RemoteError(
        f"{name}: {gone}{_words(error)} ({tried}): the same command goes on where it stopped once it can be read"
    )
