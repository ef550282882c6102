"""`distill`: from a configuration to a finished run folder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml

from clipdistill.config import as_dict, build, read_yaml
from clipdistill.errors import InputError, Preempted
from clipdistill.evaluate.evaluate import evaluate
from clipdistill.models import save_model
from clipdistill.runtime.distributed import (
    ProcessGroup,
    agree,
    barrier,
    gather_lists,
    is_main,
    on_main,
    world_size,
)
from clipdistill.runtime.links import refuse_links
from clipdistill.runtime.machine import pick_device
from clipdistill.runtime.signals import Interrupted, StopSignal
from clipdistill.statistics.scores import Scores
from clipdistill.train import checks
from clipdistill.train.checkpoint import Checkpoint, newest_checkpoint
from clipdistill.train.config import RunConfig, resolve
from clipdistill.train.failures import Place, explained
from clipdistill.train.logs import Display, JsonLines, Sink, TensorBoard, WeightsAndBiases
from clipdistill.train.loop import Progress, train
from clipdistill.train.setup import Setup
from clipdistill.train.setup import build as build_setup
from clipdistill.train.sources import Sources
from clipdistill.version import __version__

FORMAT = 1
_RECIPE_BEING_WRITTEN = ".recipe.yaml.tmp"

_FREE = {"out", "name", "method", "device", "tensorboard", "wandb", "evaluation", "preflight"}
_FREE_TRAIN = {
    "workers",
    "keep_in_memory",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skipped_steps",
    "micro_batch",
    "rank_timeout",
}
"""Settings that a resumed run may change: none of them changes what is learned."""


@dataclass(frozen=True)
class Run:
    """A run on disk."""

    folder: Path
    status: str
    steps: int
    scores: Scores | None

    @property
    def student(self) -> Path:
        """The folder of the trained student, for `load_student`."""
        return self.folder / "student"


def distill(
    config: RunConfig | Mapping[str, Any],
    *,
    allow_changes: bool = False,
    explain: bool = False,
    quiet: bool = False,
    sources: Sources | None = None,
    show: Callable[[str, int, int, bool], Display] = Display,
) -> Run:
    """Train a student as `config` says, evaluate it and write everything to `config.out`.

    `config` is a RunConfig, or a mapping with the key `recipe` and the settings to lay over it (as in a recipe file).

    A folder that holds an interrupted run of the same configuration is continued from its newest complete checkpoint;
    a finished one is returned as it is. `explain` stops after the pre-flight and prints the objective with its initial
    magnitudes. sources: data and teacher shared with other runs of this process; show: makes the progress display from
    (name, steps, first step, shown). Raises InputError for unusable input or a changed configuration, Preempted after a
    stop signal.
    """
    if not isinstance(config, RunConfig):
        config = _from_mapping(config)
    device = pick_device(config.device)
    config = with_precision(config, device)
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    place = Place(rows=_rows(config))
    limit = timedelta(seconds=config.train.rank_timeout)
    with StopSignal() as stop, ProcessGroup(device, limit) as group, explained(place):
        place.group = group
        with stop.at_once():
            if not explain:
                # rank 0 looks and writes before the others look
                agree(lambda: _open_folder(config, config.out, allow_changes) if is_main() else None)
                finished = agree(lambda: _finished(config.out))
                if finished is not None:
                    return finished
            if config.meta_teacher is not None:
                return _train_region_teacher(config, explain, quiet)
            setup = build_setup(config, device, sources)
            checkpoint, rejected = (None, []) if explain else _newest(config.out)
            progress = _resume(setup, checkpoint)
        with show(config.run_name, setup.total_steps, progress.step, is_main() and not quiet) as display:
            for sentence in rejected:
                display.say(f"passed over: {sentence}")
            if checkpoint is not None:
                display.say(f"continuing {config.out} from step {progress.step}")
            elif config.preflight.enabled or explain:
                with stop.at_once():
                    agree(lambda: checks.run(setup, display, explain=explain))
            if explain:
                return Run(config.out, "explained", 0, None)
            return _train_and_finish(setup, progress, display, stop, place)


def _train_region_teacher(config: RunConfig, explain: bool, quiet: bool) -> Run:
    """The meta-teacher of a recipe with `meta_teacher:`, trained by rank 0 while the others wait."""
    from clipdistill.regions.training import train_meta_teacher

    steps = on_main(lambda: train_meta_teacher(config, explain=explain, quiet=quiet), config.train.rank_timeout)
    return Run(config.out, "explained" if explain else "finished", steps or 0, None)


def _resume(setup: Setup, checkpoint: Checkpoint | None) -> Progress:
    """The counters to go on from; a checkpoint of an older version may lack some."""
    progress = Progress()
    if checkpoint is None:
        return progress
    setup.resume(checkpoint)
    return Progress(**{name: checkpoint.state[name] for name in vars(progress) if name in checkpoint.state})


def _rows(config: RunConfig) -> int:
    """Pairs a rank encodes at a time."""
    share = -(-config.train.batch_size // int(os.environ.get("WORLD_SIZE", "1")))
    return min(config.train.micro_batch or share, share)


def _newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, the same on every rank. Raises InputError when the ranks see different folders."""
    checkpoint, rejected = agree(lambda: newest_checkpoint(folder / "checkpoints"))
    steps = gather_lists([-1 if checkpoint is None else checkpoint.step])
    if len(set(steps)) > 1:
        raise InputError(
            f"{folder}: the ranks find different checkpoints there (steps {steps}): the run folder must be the same "
            "for all of them, on a shared file system"
        )
    return checkpoint, rejected


def _from_mapping(settings: Mapping[str, Any]) -> RunConfig:
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


def _train_and_finish(setup: Setup, progress: Progress, display: Display, stop: StopSignal, place: Place) -> Run:
    folder, status = setup.config.out, "failed"
    sinks = _sinks(setup, progress, folder) if is_main() else []
    if is_main():
        _remove_leftovers(folder)
        _describe(setup, progress, folder, "running")
    try:
        train(setup, progress, folder, sinks, display, stop, place)
        place.doing = "finishing"
        if setup.masking is not None:  # the run was only as long as its masks
            setup.prune()
        scores = on_main(lambda: _finish(setup, folder, display, stop), setup.config.train.rank_timeout)
        status = "finished"
    except (Preempted, Interrupted):
        status = "stopped"
        raise
    finally:
        for sink in sinks:
            sink.close()
        if is_main():
            # on a full disk, the error that led here is the one to tell
            with contextlib.suppress(*([OSError] if status != "finished" else [])):
                _describe(setup, progress, folder, status)
    barrier()
    return Run(folder, status, progress.step, scores)


def _finish(setup: Setup, folder: Path, display: Display, stop: StopSignal) -> Scores | None:
    """The student's folder and the final scores. Nothing is lost when a signal ends this: resuming does it again."""
    with stop.at_once():
        setup.student.module.eval()
        save_model(setup.student, folder / "student")
        return _final_scores(setup, folder, display)


def _remove_leftovers(folder: Path) -> None:
    """Delete what a killed writer of the final student left behind."""
    for path in (*folder.glob(".student.writing-*"), *folder.glob(".student.replaced-*")):
        shutil.rmtree(path, ignore_errors=True)


def _final_scores(setup: Setup, folder: Path, display: Display) -> Scores | None:
    """Student and teacher on the validation set and the labelled sets named in the configuration."""
    config = setup.config
    data: list[Any] = [setup.validation] if setup.validation is not None else []
    data += setup.sources.labelled(config)
    if not data:
        return None
    teacher: Any = None
    if setup.teacher is not None and len(setup.teacher.blocks) == 1:
        live = setup.teacher.model
        # a teacher from outside may have no text tower, and then no retrieval to measure
        whole = live is not None and hasattr(live.module, "encode_text")
        teacher = config.evaluation.teacher or (live if whole else None)
    known = None if teacher is None else setup.sources.teacher_scores(config)
    display.say("evaluating the student" + (" and the teacher" if teacher is not None and known is None else ""))
    scores = evaluate(
        setup.student,
        data,
        protocol=config.evaluation.protocol,
        teacher=teacher if known is None else None,
        batch_size=config.evaluation.batch_size,
        device=setup.device,
        progress=False,
    )
    if known is None:
        setup.sources.keep_teacher_scores(config, scores)
    else:
        scores.add(known)
    scores.save(folder / "scores.json")  # per-query results beside it: paired tests need them
    return scores


def _open_folder(config: RunConfig, folder: Path, allow_changes: bool) -> None:
    """Make the run folder, or check that the one there belongs to this configuration."""
    stored = folder / "recipe.yaml"
    temporary = folder / ".recipe.yaml.tmp"
    if folder.is_dir():
        refuse_links(folder, "run")
    if not stored.exists():
        if folder.exists() and any(path != temporary for path in folder.iterdir()):
            raise InputError(f"{folder}: the folder is not empty and holds no run; give a new one as --out")
        folder.mkdir(parents=True, exist_ok=True)
        _write_recipe(config, stored)
        return
    changed = changes(stored_settings(stored), as_dict(config))
    begun = (folder / "run.json").exists()
    if changed and begun and not allow_changes:
        raise InputError(
            f"{folder} holds a run with other settings ({'; '.join(changed[:5])}): give another --out, "
            "or --allow-changes to continue it with the new ones"
        )
    if changed:
        if begun:  # a finished run that was changed is not finished
            described = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            _write_json(folder / "run.json", {**described, "status": "running"})
        _write_recipe(config, stored)


def _write_recipe(config: RunConfig, stored: Path) -> None:
    """Store the configuration in one step; a killed writer leaves nothing that looks like a recipe."""
    temporary = stored.with_name(_RECIPE_BEING_WRITTEN)
    temporary.write_text(yaml.safe_dump(as_dict(config), sort_keys=False), encoding="utf-8")
    temporary.replace(stored)


def _finished(folder: Path) -> Run | None:
    """The run in `folder` when it is finished."""
    described = folder / "run.json"
    if not described.exists():
        return None
    values = json.loads(described.read_text(encoding="utf-8"))
    if values.get("format") != FORMAT:
        raise InputError(
            f"{described}: format {values.get('format')!r}, this version reads {FORMAT}; "
            "go on with the version that wrote it"
        )
    if values.get("status") != "finished":
        return None
    path = folder / "scores.json"
    return Run(folder, "finished", int(values["steps"]), Scores.load(path) if path.exists() else None)


def stored_settings(path: Path) -> dict[str, Any]:
    """The settings in a run's recipe.yaml; those that the version which wrote it did not know have their defaults."""
    values = read_yaml(path)
    try:
        return as_dict(build(RunConfig, values, str(path)))
    except InputError:  # settings this version does not know: they are compared as they are
        return values


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """'key: old -> new' for each setting that differs and changes what is learned."""
    free = _FREE_TRAIN if prefix == "train." else _FREE if not prefix else set()
    found = []
    for key in sorted({*old, *new} - free):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += changes(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found


def _sinks(setup: Setup, progress: Progress, folder: Path) -> list[Sink]:
    config = setup.config
    sinks: list[Sink] = [JsonLines(folder, progress.step, progress.evaluation_due)]
    if config.tensorboard:
        sinks.append(TensorBoard(folder, progress.step))
    if config.wandb is not None:
        sinks.append(WeightsAndBiases(folder, config.wandb, config.run_name, as_dict(config)))
    return sinks


def _describe(setup: Setup, progress: Progress, folder: Path, status: str) -> None:
    """run.json: what this run is, for the report and for people."""
    config = setup.config
    described = {
        "format": FORMAT,
        "name": config.run_name,
        "recipe": config.recipe,
        "method": config.method or Path(config.recipe).stem,
        "teacher": None if setup.teacher is None else setup.teacher.name,
        "student": config.student,
        "data": setup.source.name,
        "data_fingerprint": setup.source.fingerprint(),
        "validation": None if setup.validation is None else setup.validation.name,
        "seed": config.train.seed,
        "device": _device_name(setup.device),
        "ranks": world_size(),
        "dtype": config.train.precision,
        "batch_size": config.train.batch_size,
        "parameters": setup.student.parameter_counts(),
        "teacher_parameters": None
        if setup.teacher is None or setup.teacher.model is None
        else setup.teacher.model.parameter_counts(),
        "objective": dict(config.objective.weights),
        "initial_weights": setup.initial,
        "steps": progress.step,
        "total_steps": setup.total_steps,
        "samples_seen": progress.samples,
        "seconds": round(progress.seconds, 2),
        "bad_samples": progress.bad_samples,
        "skipped_steps": progress.skipped_steps,
        "truncated": {"student": progress.truncated_student, "teacher": progress.truncated_teacher},
        "status": status,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "clipdistill": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "command": " ".join(["clipdistill", *sys.argv[1:]]) if Path(sys.argv[0]).stem == "clipdistill" else None,
    }
    _write_json(folder / "run.json", described)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
    temporary.replace(path)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
