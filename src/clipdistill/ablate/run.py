"""Runs the grid: one run after the other in one process, everything that runs share opened and decoded once."""

from __future__ import annotations

import gc
import shutil
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipdistill.ablate.grid import GridRun
from clipdistill.ablate.progress import GridDisplay
from clipdistill.errors import ClipdistillError, InputError, Preempted, StorageError
from clipdistill.models.known import copies_held
from clipdistill.runs.folder import CHECKPOINTS, LOCK
from clipdistill.runtime.distributed import ProcessGroup, gather_lists, is_main, world_size
from clipdistill.runtime.files import make_folder, read_json, write_json
from clipdistill.runtime.locks import LEASE, Claims, FolderLock
from clipdistill.runtime.machine import pick_device, return_freed_memory
from clipdistill.train.run import distill
from clipdistill.train.sources import SharedSources

LOCKS, FAILURES = ".locks", ".failures"


@dataclass
class GridOutcome:
    """What one call did: names of runs."""

    finished: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run_grid(
    runs: Sequence[GridRun],
    out: Path,
    *,
    quiet: bool = False,
    keep_checkpoints: bool = False,
) -> GridOutcome:
    """Train what is not finished.

    A failed run is recorded in OUT/.failures and the others go on; it is tried again by the next call. A run that
    another process works on is left to it. Under torchrun all ranks train each run together, and a failure ends the
    job, as ranks that failed at different places could not go on together. Raises Preempted after a stop signal,
    StorageError when the disk is full, and InputError before the first run when a folder belongs to another
    configuration.
    """
    states = {run.name: run.state() for run in runs}
    waiting = [run for run in runs if states[run.name] != "finished"]
    outcome = GridOutcome(skipped=[run.name for run in runs if states[run.name] == "finished"])
    for run in runs if is_main() else ():
        if states[run.name] == "finished":
            _tidy(run, out, keep_checkpoints)
    if not waiting:
        return outcome
    with ProcessGroup(pick_device(waiting[0].config.device)):
        # what failed before comes last, so that it cannot keep the others waiting
        failed_before = {run.name for run in waiting if _failure(out, run).exists()}
        waiting.sort(key=lambda run: run.name in failed_before)
        sources = SharedSources()
        with GridDisplay(waiting, done=len(outcome.skipped), enabled=is_main() and not quiet) as display:
            for run in waiting:
                with _claimed(run, out) as free:
                    if not free:
                        outcome.elsewhere.append(run.name)
                        display.passed_over(run, "another process works on it")
                        continue
                    if run.state() == "finished":  # by another process since this one looked
                        outcome.skipped.append(run.name)
                        display.passed_over(run, "finished by another process")
                        continue
                    _one(run, out, sources, display, outcome, quiet, keep_checkpoints)
                _give_back_memory()
    return outcome


def _one(
    run: GridRun,
    out: Path,
    sources: SharedSources,
    display: GridDisplay,
    outcome: GridOutcome,
    quiet: bool,
    keep_checkpoints: bool,
) -> None:
    display.begin(run)
    began = time.monotonic()
    try:
        with copies_held():  # every run begins with the weights that the program gave
            result = distill(run.config, quiet=quiet, sources=sources, show=display.line)
        if is_main():
            if not keep_checkpoints:  # a finished run is not resumed; its student is beside them
                shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
            _failure(out, run).unlink(missing_ok=True)
        outcome.finished.append(run.name)
        display.end(run, result, time.monotonic() - began)
    except (Preempted, StorageError):  # a full disk would stop the next run too
        raise
    except Exception as error:
        outcome.failed[run.name] = f"{type(error).__name__}: {error}"
        display.failed(run, error)
        if is_main():
            _record_failure(out, run, error)
        if world_size() > 1:
            raise ClipdistillError(
                f"{run.name} failed ({error}); under torchrun that ends the job: start it again for the other runs"
            ) from error


def _tidy(run: GridRun, out: Path, keep_checkpoints: bool) -> None:
    """Take away what a process that was killed after a run's last word left: its locks, checkpoints and a failure."""
    checkpoints, failure = run.folder / CHECKPOINTS, _failure(out, run)
    left = [checkpoints] if checkpoints.exists() and not keep_checkpoints else []
    if not any(path.exists() for path in (*left, failure, run.folder / LOCK, out / LOCKS / f"{run.name}.lock")):
        return
    claims = Claims(out / LOCKS)
    if claims.take(run.name):
        with suppress(InputError, OSError), FolderLock(run.folder / LOCK, "at work"):
            for folder in left:
                shutil.rmtree(folder, ignore_errors=True)
            failure.unlink(missing_ok=True)
        claims.give_back_all()


def _give_back_memory() -> None:
    """Return what a run freed to the system; glibc keeps it in pieces otherwise, and thirty runs grew to 4 GB so."""
    gc.collect()
    return_freed_memory()


@contextmanager
def _claimed(run: GridRun, out: Path) -> Iterator[bool]:
    """Whether this process may train the run; while it does, no other process may."""
    claims = Claims(out / LOCKS)
    taken = gather_lists([claims.take(run.name)] if is_main() else [])[0]
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(LEASE / 10):
            claims.renew()

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        stop.set()
        thread.join()
        claims.give_back_all()


def _failure(out: Path, run: GridRun) -> Path:
    return out / FAILURES / f"{run.name}.json"


def _record_failure(out: Path, run: GridRun, error: Exception) -> None:
    path = _failure(out, run)
    make_folder(path.parent, "records of failures")
    described: dict[str, Any] = {
        "run": run.name,
        "error": type(error).__name__,
        "message": str(error),
        "traceback": traceback.format_exception(error),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(path, described, checked=True)


def failures(out: Path) -> dict[str, str]:
    """The recorded failures of runs that have not finished since: name -> message."""
    found = {}
    for path in sorted((out / FAILURES).glob("*.json")):
        try:
            described = read_json(path)
            found[path.stem] = f"{described.get('error')}: {described.get('message')}"
        except InputError as error:
            found[path.stem] = f"its record is damaged ({error})"
    return found
