"""`distill`: from a configuration to a finished run folder."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import clipdistill
from clipdistill.config import as_dict, read_yaml
from clipdistill.errors import InputError, Preempted
from clipdistill.evaluate.evaluate import evaluate
from clipdistill.evaluate.scores import Scores
from clipdistill.models import save_model
from clipdistill.train import checks
from clipdistill.train.checkpoint import newest_checkpoint
from clipdistill.train.config import RunConfig, resolve
from clipdistill.train.distributed import ProcessGroup, barrier, is_main, pick_device, world_size
from clipdistill.train.logs import Display, JsonLines, Sink, TensorBoard, WeightsAndBiases
from clipdistill.train.loop import Progress, train
from clipdistill.train.setup import Setup
from clipdistill.train.setup import build as build_setup
from clipdistill.train.sources import Sources

FORMAT = 1

_FREE = {"out", "name", "method", "device", "tensorboard", "wandb", "evaluation", "preflight"}
_FREE_TRAIN = {
    "workers",
    "keep_in_memory",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skipped_steps",
    "micro_batch",
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
    with ProcessGroup(device):
        folder = config.out
        if not explain:
            finished = _open_folder(config, folder, allow_changes)
            if finished is not None:
                return finished
        setup = build_setup(config, device, sources)
        progress = Progress()
        checkpoint, rejected = newest_checkpoint(folder / "checkpoints")
        resumed = checkpoint is not None and not explain
        if checkpoint is not None and not explain:
            setup.resume(checkpoint)
            progress = Progress(**{name: checkpoint.state[name] for name in vars(progress)})
        shown = is_main() and not quiet
        with show(config.run_name, setup.total_steps, progress.step, shown) as display:
            for sentence in rejected:
                display.say(f"passed over: {sentence}")
            if resumed:
                display.say(f"continuing {folder} from step {progress.step}")
            elif config.preflight.enabled or explain:
                checks.run(setup, display, explain=explain)
            if explain:
                return Run(folder, "explained", 0, None)
            return _train_and_finish(setup, progress, folder, display)


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


def _train_and_finish(setup: Setup, progress: Progress, folder: Path, display: Display) -> Run:
    status = "failed"
    sinks = _sinks(setup, progress, folder) if is_main() else []
    if is_main():
        _describe(setup, progress, folder, "running")
    try:
        train(setup, progress, folder, sinks, display)
        status = "finished"
    except Preempted:
        status = "stopped"
        raise
    finally:
        for sink in sinks:
            sink.close()
        if is_main() and status != "finished":
            _describe(setup, progress, folder, status)
    scores = None
    if setup.masking is not None:  # the run was only as long as its masks
        setup.prune()
    if is_main():
        setup.student.module.eval()
        save_model(setup.student, folder / "student")
        scores = _final_scores(setup, folder, display)
        _describe(setup, progress, folder, status)
    barrier()
    return Run(folder, status, progress.step, scores)


def _final_scores(setup: Setup, folder: Path, display: Display) -> Scores | None:
    """Student and teacher on the validation set and the labelled sets named in the configuration."""
    config = setup.config
    data: list[Any] = [setup.validation] if setup.validation is not None else []
    data += setup.sources.labelled(config)
    if not data:
        return None
    teacher: Any = None
    if setup.teacher is not None and len(setup.teacher.blocks) == 1:
        teacher = config.evaluation.teacher or setup.teacher.model
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


def _open_folder(config: RunConfig, folder: Path, allow_changes: bool) -> Run | None:
    """Make the run folder, or check that the one there belongs to this configuration; the run if it is finished."""
    stored = folder / "recipe.yaml"
    if not stored.exists():
        if is_main():
            if folder.exists() and any(folder.iterdir()):
                raise InputError(f"{folder}: the folder is not empty and holds no run; give a new one as --out")
            folder.mkdir(parents=True, exist_ok=True)
            stored.write_text(yaml.safe_dump(as_dict(config), sort_keys=False), encoding="utf-8")
        barrier()
        return None
    changed = changes(read_yaml(stored), as_dict(config))
    if changed and not allow_changes:
        raise InputError(
            f"{folder} holds a run with other settings ({'; '.join(changed[:5])}): give another --out, "
            "or --allow-changes to continue it with the new ones"
        )
    described = folder / "run.json"
    if described.exists() and not changed:
        values = json.loads(described.read_text(encoding="utf-8"))
        if values.get("status") == "finished":
            path = folder / "scores.json"
            scores = Scores.load(path) if path.exists() else None
            return Run(folder, "finished", int(values["steps"]), scores)
    return None


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
    sinks: list[Sink] = [JsonLines(folder, progress.step)]
    if config.tensorboard:
        sinks.append(TensorBoard(folder))
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
            "clipdistill": clipdistill.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "command": " ".join(["clipdistill", *sys.argv[1:]]) if Path(sys.argv[0]).stem == "clipdistill" else None,
    }
    temporary = folder / ".run.json.tmp"
    temporary.write_text(json.dumps(described, indent=1), encoding="utf-8")
    temporary.replace(folder / "run.json")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
