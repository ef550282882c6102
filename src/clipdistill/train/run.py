"""`distill`: from a configuration to a finished run folder."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from clipdistill.errors import InputError, Preempted
from clipdistill.registry import TASKS, wing
from clipdistill.runs.folder import CHECKPOINTS, SCORES, STUDENT, RunFolder
from clipdistill.runtime.console import html_page
from clipdistill.runtime.distributed import ProcessGroup, agree, barrier, gather_lists, is_main, on_main, world_size
from clipdistill.runtime.files import sha256
from clipdistill.runtime.machine import keep_freed_memory, pick_device, return_freed_memory
from clipdistill.runtime.signals import Interrupted, StopSignal
from clipdistill.statistics.scores import Scores
from clipdistill.train.callbacks import Callbacks, Curve, Log, RunView, choose
from clipdistill.train.checkpoint import Checkpoint, newest_checkpoint, restore
from clipdistill.train.config import RunConfig, resolve
from clipdistill.train.display import Display
from clipdistill.train.failures import Whereabouts, explained
from clipdistill.train.health import Health
from clipdistill.train.loop import Loop, Progress, train
from clipdistill.train.opening import check_identity, opened, settings_fingerprint
from clipdistill.train.plan import planned
from clipdistill.train.sources import Sources
from clipdistill.train.task import Outcome, Say, Task
from clipdistill.version import __version__

_log = logging.getLogger("clipdistill")


@dataclass(frozen=True)
class Run:
    """A run on disk. It stands for its folder where a model or a run is named: `cd.export(run, ...)`."""

    folder: Path
    status: str
    steps: int
    scores: Scores | None

    @property
    def student(self) -> Path:
        """The folder of the trained student, for `load_student`."""
        return self.folder / STUDENT

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        return f"{self.folder}: {self.status}, {self.steps:,} steps" + (f"\n{self.scores!r}" if self.scores else "")

    def _repr_html_(self) -> str:
        shown = "" if self.scores is None else self.scores._repr_html_()
        return html_page(text=f"{self.folder}: {self.status}, {self.steps:,} steps") + shown


def distill(
    config: RunConfig | Mapping[str, Any],
    *,
    allow_changes: bool = False,
    explain: bool = False,
    quiet: bool = False,
    sources: Sources | None = None,
    show: Callable[[str, int, int, bool], Display] = Display,
    callbacks: Sequence[Any] = (),
) -> Run:
    """Train a student as `config` says, evaluate it and write everything to `config.out`.

    As `cd.distill` (api.py), for one run, with sources: data and teacher shared with other runs of this process; show:
    makes the progress display from (name, steps, first step, shown). Raises InputError for unusable input or a changed
    configuration, Preempted after a stop signal.
    """
    if not isinstance(config, RunConfig):
        config = from_mapping(config)
    device = pick_device(config.device)
    config = with_precision(config, device)
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    chosen = choose(config, callbacks)
    place = Whereabouts(rows=_rows(config))
    limit = timedelta(seconds=config.train.rank_timeout)
    with StopSignal() as stop, ProcessGroup(device, limit) as group, explained(place), contextlib.ExitStack() as held:
        place.group = group
        if device.type == "cpu":
            keep_freed_memory()
            held.callback(return_freed_memory)
        with stop.at_once():
            notes: list[str] = []
            if not explain:
                # rank 0 looks and writes before the others look
                folder = opened(config, allow_changes)
                notes = agree(lambda: held.enter_context(folder) if is_main() else [])
                finished = agree(lambda: _finished(config.out))
                if finished is not None:
                    return finished
            early = show(config.run_name, 1, 0, is_main() and not quiet)
            task = make_task(config, device, sources, early.say)
            checkpoint, rejected = (None, []) if explain else _newest(config.out)
            progress = Progress() if checkpoint is None else resume(task, checkpoint)
            notes += [f"passed over: {sentence}" for sentence in rejected]
            if rejected and checkpoint is None:
                notes.append("no whole checkpoint is left: the run begins again at step 0")
            if not explain:
                parts = {**task.identity(), "training images": task.source.images_fingerprint()}
                parts |= {f"plug-in {Path(plugin).name}": sha256(plugin) for plugin in config.plugins}
                run = RunFolder(config.out)
                notes += agree(lambda: check_identity(run, parts, progress.step, allow_changes) if is_main() else [])
        with show(config.run_name, task.total_steps, progress.step, is_main() and not quiet) as display:
            tell = _log.warning if quiet and is_main() else display.say  # of damage and changes, under --quiet too
            for note in notes:
                tell(note)
            if checkpoint is not None:
                display.say(f"continuing {config.out} from step {progress.step}")
            elif task.source.problems.total:
                display.say(f"left out when opening the data: {task.source.problems.summary()}")
            idle = wing("clipdistill.train.idle:idle") if checkpoint is None else None
            for note in [] if idle is None else idle(config, task.total_steps):
                display.say(note)
            if checkpoint is None and (config.preflight.enabled or explain):
                with stop.at_once():
                    agree(lambda: _preflight(config, task, display.say, explain))
            if explain:
                display.say("\n".join(planned(config, task).lines()))
                return Run(config.out, "explained", 0, None)
            with stop.at_once():
                progress.towers = task.tune(None if checkpoint is None else progress.towers, display.say)
            own = [display, Log(), Curve(display.say), Health(display.say)]
            view = RunView(config, config.out, progress.step, task.total_steps, validation=task.validation_name or "")
            told = Callbacks(own, chosen, display.say)
            return _train_and_finish(Loop(config, task, progress, told, display.say, stop, place, view))


def make_task(config: RunConfig, device: torch.device, sources: Sources | None = None, say: Say = print) -> Task:
    """What `config` trains, ready for its first step. Raises InputError for unusable input."""
    if config.evaluation.zero_shot:
        from clipdistill.evaluate.evaluate import opened_all

        for item in (sources or Sources()).labelled(config):  # one that cannot be read is told before the first step
            opened_all(item, None, None)
    kind = "distillation" if config.train.ternary == "none" else "ternary student"
    kind = "curated batches" if config.train.curation or config.train.neighbours else kind
    kind = kind if config.meta_teacher is None else "region teacher"
    return TASKS.get(kind)(config, device, sources, say)


def resume(task: Task, checkpoint: Checkpoint) -> Progress:
    """Take up weights and moments of a checkpoint; its counters, of which one of an older version may lack some."""
    task.resume(checkpoint.folder, checkpoint.state["files"])
    student, modules = task.checkpoint()
    restore(checkpoint, None if student is None else student.module, modules, task.optimiser)
    return Progress(**{name: checkpoint.state[name] for name in vars(Progress()) if name in checkpoint.state})


def _preflight(config: RunConfig, task: Task, say: Say, explain: bool) -> None:
    from clipdistill.train.preflight import check_teacher

    task.preflight(say, explain, lambda embeddings, name: check_teacher(config, embeddings, name))


def _rows(config: RunConfig) -> int:
    """Pairs a rank encodes at a time."""
    share = -(-config.train.batch_size // int(os.environ.get("WORLD_SIZE", "1")))
    return min(config.train.micro_batch or share, share)


def _newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, the same on every rank. Raises InputError when the ranks see different folders."""
    checkpoint, rejected = agree(lambda: newest_checkpoint(folder / CHECKPOINTS))
    steps = gather_lists([-1 if checkpoint is None else checkpoint.step])
    if len(set(steps)) > 1:
        raise InputError(
            f"{folder}: the ranks find different checkpoints there (steps {steps}): the run folder must be the same "
            "for all of them, on a shared file system"
        )
    return checkpoint, rejected


def from_mapping(settings: Mapping[str, Any]) -> RunConfig:
    """The configuration of a run from the key `recipe`, perhaps `size`, and settings as in a recipe file."""
    rest = {key: value for key, value in settings.items() if key not in ("recipe", "size")}
    if "recipe" not in settings:
        raise InputError("distill: the key 'recipe' is missing, for example  recipe='clip-rd'")
    return resolve(settings["recipe"], rest, size=settings.get("size"))


def with_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """`precision: auto` decided for this device, so that what is stored with the run is what was used."""
    if config.train.precision != "auto":
        return config
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    chosen = config.train.model_copy(update={"precision": "bf16" if fast else "fp32"})
    return config.model_copy(update={"train": chosen})


def _train_and_finish(loop: Loop) -> Run:
    config, task, progress = loop.config, loop.task, loop.progress
    run, status, outcome = RunFolder(config.out), "failed", Outcome(None, "")
    if is_main():
        _describe(loop, "running", None)
    try:
        train(loop)
        loop.place.doing = "finishing"
        task.end()
        outcome = on_main(lambda: _finish(loop), config.train.rank_timeout) or outcome
        status = "finished"
    except (Preempted, Interrupted):
        status = "stopped"
        raise
    finally:
        # on a full disk, the error that led here is the one to tell
        with contextlib.suppress(*([OSError] if status != "finished" else [])):
            final = {f"{s.protocol.dataset}/{s.metric}": s.value for s in outcome.scores or () if s.model == "student"}
            loop.tell("on_end", status=status, final_scores=final)
            if is_main():
                _describe(loop, status, outcome.fingerprint or None)
                if status == "finished" and loop.progress.best:
                    from clipdistill.train.best import BEST

                    shutil.rmtree(run / BEST, ignore_errors=True)
    barrier()
    return Run(run.path, status, progress.step, outcome.scores)


def _finish(loop: Loop) -> Outcome:
    """The student's folder and the final scores. Nothing is lost when a signal ends this: resuming does it again."""
    with loop.stop.at_once():
        out, progress, (student, modules) = loop.config.out, loop.progress, loop.task.checkpoint()
        if progress.best and student is not None:
            from clipdistill.train.best import take

            loop.say(take(student, out, progress.best, progress.step, modules.get("average")))
        outcome = loop.task.finish(out, loop.say)
        if outcome.scores is not None:
            outcome.scores.save(loop.config.out / SCORES)  # per-query results beside it: paired tests need them
        return outcome


def _finished(folder: Path) -> Run | None:
    """The run in `folder` when it is finished."""
    run = RunFolder(folder)
    facts = run.facts() if run.is_run else {}
    if facts.get("status") != "finished":
        return None
    path = run / SCORES
    return Run(folder, "finished", facts.get("steps") or 0, Scores.load(path) if path.exists() else None)


def _describe(loop: Loop, status: str, fingerprint: str | None) -> None:
    """run.json: what this run is, for the report and for people. fingerprint: of the student, once it is finished."""
    config, task, progress = loop.config, loop.task, loop.progress
    described = {
        "name": config.run_name,
        "recipe": config.recipe,
        "method": config.method or Path(config.recipe).stem,
        "data": task.source.name,
        "data_fingerprint": task.source.fingerprint(),
        "seed": config.train.seed,
        "device": _device_name(task.device),
        "ranks": world_size(),
        "batch_size": config.train.batch_size,
        "objective": dict(config.objective.weights),
        "steps": progress.step,
        "total_steps": task.total_steps,
        "samples_seen": progress.samples,
        "seconds": round(progress.seconds, 2),
        "bad_samples": progress.bad_samples,
        "skipped_steps": progress.skipped_steps,
        **({"best": progress.best} if progress.best else {}),
        **({"sets": {name: own["samples"] for name, own in progress.sets.items()}} if progress.sets else {}),
        **({"towers": progress.towers} if progress.towers else {}),
        "truncated": {"student": progress.truncated_student, "teacher": progress.truncated_teacher},
        **task.facts(),
        "student_fingerprint": fingerprint,
        "settings_fingerprint": settings_fingerprint(config),
        "status": status,
        "callbacks_failed": loop.callbacks.failed,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"clipdistill": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "command": " ".join(["clipdistill", *sys.argv[1:]]) if Path(sys.argv[0]).stem == "clipdistill" else None,
    }
    RunFolder(config.out).write_facts(described)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.machine()} Apple GPU"
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
