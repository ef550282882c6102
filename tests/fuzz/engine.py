"""The fuzzer: a worker process tries inputs, its parent watches it, so that crashes and hangs are found."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from clipdistill.data.problems import BadSample
from clipdistill.errors import ClipdistillError
from tests.fuzz.coverage import Coverage
from tests.fuzz.mutate import mangle
from tests.fuzz.seeds import good_images
from tests.fuzz.targets import Target

SECONDS = 10.0
"""Processor time that one input may take."""
CLOCK = 120.0
"""Seconds by the clock after which a silent worker is taken for hung (an idle wait, or a loop in native code)."""
SILENT, GONE = "silent", "gone"
MEMORY = 400 << 20
"""Bytes by which one input may raise the process's peak (pictures have at most a million pixels)."""
WATCHED = 100
"""Tries of a target without a new step after which only every fourth is watched."""
ROUND = 20_000
"""Inputs after which a worker is replaced, with the next seed, and what was found is written: a killed run goes on."""


@dataclass
class Failure:
    """One input that was not handled as promised; `input` is the file it was kept in."""

    target: str
    kind: str
    detail: str
    input: str


@dataclass
class Result:
    """What a run has tried and found."""

    seed: int = 0
    rounds: int = 0
    tried: int = 0
    refused: int = 0
    accepted: int = 0
    seconds: float = 0.0
    by_target: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    edges: int = 0
    lines: dict[str, tuple[int, int]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def unfinished(cls, out: Path, seed: int, inputs: int) -> Result:
        """What an earlier run of this seed into `out` had found before it ended early, or an empty one."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            found = cls(**json.loads((out / "result.json").read_text(encoding="utf-8")))
            if found.seed == seed and found.tried < inputs:
                found.failures = [Failure(**failure) for failure in found.failures]  # type: ignore[arg-type]
                return found
        return cls(seed=seed)


class TooLong(BaseException):
    """One input used more processor time than allowed. No Exception: what is tried must not swallow it."""


def sandbox() -> Path:
    """A new empty folder, in memory where the system has such a place."""
    fast = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="clipdistill-fuzz-", dir=fast if fast.is_dir() else None))


def try_input(target: Target, data: bytes, folder: Path) -> tuple[str, str]:
    """('accepted' | 'refused' | kind of failure, detail) of one input; `folder` is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in good_images().items():
        (folder / name).write_bytes(content)
    os.environ["CLIPDISTILL_CACHE"] = str(folder.parent / "cache")
    shutil.rmtree(folder.parent / "cache", ignore_errors=True)
    os.chdir(folder)
    before = _peak()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.run(data, folder)
        outcome = ("accepted", "")
    except (BadSample, ClipdistillError) as error:
        outcome = ("refused", str(error))
        if not str(error):
            outcome = ("silent", "refused without a word")
    except TooLong:
        outcome = ("slow", f"more than {SECONDS} s of processor time\n{traceback.format_exc()}")
    except Exception as error:
        outcome = (type(error).__name__, traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = _peak() - before
    if grown > MEMORY and outcome[0] in ("accepted", "refused"):
        outcome = ("memory", f"{grown >> 20} MiB more at once")
    return outcome


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _alarm(number: int, frame: Any) -> None:
    raise TooLong


class Worker:
    """Tries inputs one after the other; lives in a process of its own."""

    def __init__(self, targets: Sequence[Target], files: Sequence[Path], place: Path, corpus: Path, seed: int) -> None:
        signal.signal(signal.SIGPROF, _alarm)
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        self.targets = targets
        self.coverage = Coverage(files)
        self.place = place
        self.corpus_folder = corpus
        self.rng = random.Random(seed)
        self.corpus: dict[str, list[bytes]] = {}
        self.quiet: Counter[str] = Counter()  # tries of a target since one of them took a new step

    def load(self, alive: Callable[[], None]) -> None:
        """Take the seeds and what earlier workers kept, and learn what they cover."""
        for target in self.targets:
            folder = self.corpus_folder / target.name
            kept = [path.read_bytes() for path in sorted(folder.glob("*"))] if folder.is_dir() else []
            self.corpus[target.name] = [*target.seeds, *kept]
            for data in self.corpus[target.name]:
                self.attempt(target, data)
                alive()

    def attempt(self, target: Target, data: bytes) -> tuple[str, str]:
        (self.place / "current.name").write_text(target.name)
        (self.place / "current.bin").write_bytes(data)
        # watching takes as long as running: targets that have long found nothing new are watched now and then
        watched = self.quiet[target.name] < WATCHED or self.quiet[target.name] % 4 == 0
        with self.coverage.recording(watched):
            outcome = try_input(target, data, self.place / "folder" / "inner")
        self.quiet[target.name] = 0 if self.coverage.found_new else self.quiet[target.name] + 1
        return outcome

    def next_input(self, target: Target) -> bytes:
        corpus, rng = self.corpus[target.name], self.rng
        if target.generate is not None and rng.random() < 0.3:
            data = target.generate(rng)
            if rng.random() < 0.5:
                return data
        else:
            # the newest ones have been tried least
            data = corpus[-1 - int(len(corpus) * rng.random() ** 2)] if rng.random() < 0.5 else rng.choice(corpus)
        for mutation in target.structured:
            if rng.random() < 0.7:
                data = mutation(data, rng)
                if rng.random() < 0.7:
                    return data
        data = mangle(data, rng, target.words, corpus)
        for repair in target.repairs:
            if rng.random() < 0.7:
                data = repair(data)
        return data

    def keep(self, target: Target, data: bytes) -> None:
        self.corpus[target.name].append(data)
        folder = self.corpus_folder / target.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{len(self.corpus[target.name]):06d}-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)


def _work(
    pipe: Connection,
    targets: Sequence[Target],
    files: Sequence[Path],
    place: Path,
    corpus: Path,
    seed: int,
    count: int,
    until: float,
) -> None:
    """A worker's life: one message an input, the coverage at the end, after `count` inputs or at the time `until`."""
    worker = Worker(targets, files, place, corpus, seed)
    worker.load(lambda: pipe.send(("", "loading", "", b"")))
    weights = [target.weight for target in targets]
    for _ in range(count):
        if time.monotonic() > until:
            break
        (target,) = worker.rng.choices(targets, weights)
        data = worker.next_input(target)
        kind, detail = worker.attempt(target, data)
        if worker.coverage.found_new and kind in ("accepted", "refused"):
            worker.keep(target, data)
        pipe.send((target.name, kind, detail if kind not in ("accepted", "refused") else "", data if detail else b""))
    pipe.send(("", "end", worker.coverage.summary(), len(worker.coverage.edges)))


def fuzz(
    targets: Sequence[Target],
    files: Sequence[Path],
    out: Path,
    *,
    inputs: int,
    seconds: float,
    seed: int = 0,
    each: float = 20.0,
    stop_at: int = 50,
) -> Result:
    """Try `inputs` inputs, or as many as `seconds` allow; prints progress every `each` seconds.

    Failures are kept below `out`/failures, one for each place in the code; `stop_at` different ones end the run. An
    earlier run of this seed that ended before its time is continued at the round after its last whole one.
    """
    result, began, said = Result.unfinished(out, seed, inputs), time.monotonic(), time.monotonic()
    before, counts = result.seconds, Counter(result.by_target)
    known: set[str] = set()
    place = sandbox()
    corpus = out / "corpus"
    context = multiprocessing.get_context("fork")
    try:
        while result.tried < inputs and time.monotonic() - began < seconds and len(known) < stop_at:
            here, there = context.Pipe(duplex=False)
            left = min(inputs - result.tried, ROUND)
            arguments = (there, targets, files, place, corpus, 1000 * seed + result.rounds, left, began + seconds)
            process = context.Process(target=_work, args=arguments)
            process.start()
            there.close()
            result.rounds += 1
            while True:
                message = _receive(here, CLOCK)
                if message in (SILENT, GONE):
                    if message == GONE:
                        process.join(CLOCK)
                    process.kill()
                    process.join()
                    name, data = (place / "current.name").read_text(), (place / "current.bin").read_bytes()
                    kind = "hang" if message == SILENT else f"crash (exit code {process.exitcode})"
                    result.tried += 1
                    counts[name] += 1
                    _record(result, known, out, name, kind, kind, data)
                    break
                name, kind, detail, data = message
                if kind == "loading":
                    continue
                if kind == "end":
                    result.lines, result.edges = detail, data
                    process.join()
                    break
                result.tried += 1
                counts[name] += 1
                result.accepted += kind == "accepted"
                result.refused += kind == "refused"
                if kind not in ("accepted", "refused"):
                    _record(result, known, out, name, kind, detail, data)
                now = time.monotonic()
                if now - said > each:
                    said = now
                    print(
                        f"{now - began:7.0f} s  {result.tried:8d} inputs  {result.refused / result.tried:4.0%} refused"
                        f"  {len(known)} failures",
                        flush=True,
                    )
                if len(known) >= stop_at:
                    process.kill()
                    process.join()
                    break
            here.close()
            result.seconds = before + time.monotonic() - began
            result.by_target = dict(sorted(counts.items()))
            write_result(result, out)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    result.kept = sum(1 for _ in corpus.rglob("*") if _.is_file()) if corpus.is_dir() else 0
    return result


def _receive(pipe: Connection, seconds: float) -> Any:
    """The next message; GONE when the worker died, SILENT when it said nothing for so long.

    The clock is read in steps of a second, so that a machine or a process group that was paused counts as one of them.
    """
    try:
        return pipe.recv() if any(pipe.poll(1) for _ in range(max(1, round(seconds)))) else SILENT
    except (EOFError, OSError):
        return GONE


def _record(result: Result, known: set[str], out: Path, name: str, kind: str, detail: str, data: bytes) -> None:
    """Keep the first input that fails at each place of the code."""
    places = [line.strip() for line in detail.splitlines() if line.lstrip().startswith('File "')]
    mark = f"{name} {kind} {places[-1] if places else ''}"
    if mark in known:
        return
    known.add(mark)
    folder = out / "failures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}.bin"
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(f"{kind}\n{detail}\n", encoding="utf-8", errors="backslashreplace")
    result.failures.append(Failure(name, kind, detail.strip().splitlines()[-1][:200] if detail else "", str(path)))
    print(f"FAILURE in {name}: {kind}: {result.failures[-1].detail}\n  kept as {path}", file=sys.stderr, flush=True)


def replay(target: Target, data: bytes) -> tuple[str, str]:
    """Try one kept input in this process."""
    signal.signal(signal.SIGPROF, _alarm)
    place, back = sandbox(), Path.cwd()
    try:
        return try_input(target, data, place / "folder" / "inner")
    finally:
        os.chdir(back)
        shutil.rmtree(place, ignore_errors=True)


def write_result(result: Result, out: Path) -> None:
    (out / "result.json").write_text(json.dumps(result.to_json(), indent=1), encoding="utf-8")
