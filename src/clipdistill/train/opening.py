"""Opening a run folder: a new one, one to go on with, or one that is finished; what must be the same for that."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

from clipdistill.config import as_dict, build
from clipdistill.errors import InputError
from clipdistill.runs.folder import CHECKPOINTS, IDENTITY, LOCK, RECIPE, RUN, RunFolder
from clipdistill.runtime.files import (
    digest_of,
    first_other,
    make_folder,
    read_json,
    refuse_links,
    remove_leftovers,
    write_json,
)
from clipdistill.runtime.locks import FolderLock
from clipdistill.train.config import RunConfig

_FREE = {
    "out", "name", "method", "device", "tensorboard", "wandb", "mlflow", "callbacks", "evaluation", "preflight"
}  # fmt: skip
_FREE_TRAIN = {
    "workers",
    "keep_in_memory",
    "features_folder",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_skipped_steps",
    "micro_batch",
    "attention",
    "compile",
    "rank_timeout",
}
"""Settings that a resumed run may change: none of them changes what is learned."""


@contextlib.contextmanager
def opened(config: RunConfig, allow_changes: bool) -> Iterator[list[str]]:
    """The run folder made, or checked to belong to this configuration, and held until the end of the block.

    Gives sentences about damaged files that were set aside. Raises InputError when another process holds the folder,
    when it is another run's, or cannot be written.
    """
    run = RunFolder(config.out)
    if os.path.isdir(run.path):  # noqa: PTH112 - False for a name that is too long, too
        refuse_links(run.path, "run")
        begun = (run / RECIPE).exists() or (run / CHECKPOINTS).exists()
        if not begun and (other := first_other(run.path, LOCK)):
            raise InputError(f"{run.path}: the folder is not empty ({other}) and holds no run; give a new one as --out")
    make_folder(run.path, "run")
    with FolderLock(run / LOCK, f"{run.path}: another process is training here"):
        remove_leftovers(run.path)
        for path in (*run.path.glob(".student.writing-*"), *run.path.glob(".student.replaced-*")):
            shutil.rmtree(path, ignore_errors=True)
        yield _open(config, run, allow_changes)


def _open(config: RunConfig, run: RunFolder, allow_changes: bool) -> list[str]:
    said = run.mend()
    old = run.path / "checkpoint.safetensors"
    if old.exists() and not (run / CHECKPOINTS).exists():
        raise InputError(
            f"{old}: the state of a region teacher that an older version stopped in the middle, which this version "
            "cannot go on from: finish it with that version, or remove the file to train it anew"
        )
    changed: list[str] = []
    if (run / RECIPE).exists():
        try:
            changed = changes(stored_settings(run), as_dict(config))
        except InputError as error:
            recorded = _recorded_settings(run)
            if recorded not in (None, settings_fingerprint(config)) and not allow_changes:
                raise InputError(
                    f"{error}, and the settings given are not those of the run: give the same as before, another "
                    "--out, or --allow-changes to continue it with the new ones"
                ) from error
            if recorded is None and not (run / CHECKPOINTS).exists():
                raise
            said.append(f"{error}; it is kept as {run.set_aside(RECIPE).name} and written anew")
    try:
        begun = run.status() is not None
    except InputError as error:
        if "this version reads" in str(error) or not (run / RECIPE).exists():
            raise
        said.append(f"{error}; it is kept as {run.set_aside(RUN).name} and written anew")
        begun = True
    if changed and begun and not allow_changes:
        raise InputError(
            f"{run.path} holds a run with other settings ({'; '.join(changed[:5])}): give another --out, "
            "or --allow-changes to continue it with the new ones"
        )
    if changed and run.is_run:  # a finished run that was changed is not finished, and its scores are not the new one's
        new = {"status": "running", "student_fingerprint": None, "settings_fingerprint": settings_fingerprint(config)}
        run.write_facts({**run.facts(), **new})
    if changed or not (run / RECIPE).exists():
        run.write_settings(as_dict(config))
    return said


def stored_settings(run: RunFolder) -> dict[str, Any]:
    """The settings in a run's recipe.yaml; those that the version which wrote it did not know have their defaults."""
    values = run.settings()
    try:
        return as_dict(build(RunConfig, values, str(run / RECIPE)))
    except InputError:  # settings this version does not know: they are compared as they are
        return values


def settings_fingerprint(config: RunConfig) -> str:
    """sha256 (hex) of the settings that change what is learned."""
    values = {key: value for key, value in as_dict(config).items() if key not in _FREE}
    return digest_of({**values, "train": {k: v for k, v in values["train"].items() if k not in _FREE_TRAIN}})


def _recorded_settings(run: RunFolder) -> str | None:
    """The `settings_fingerprint` of the run; None where none can be read."""
    with contextlib.suppress(InputError):
        return run.facts().get("settings_fingerprint")
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


def check_identity(run: RunFolder, parts: Mapping[str, str], step: int, allow_changes: bool) -> list[str]:
    """Record the fingerprints of what the run begins with, or compare them with those it began with.

    identity.json keeps the first fingerprints for ever; a difference that `allow_changes` lets through is added to its
    list of changes. step: the checkpoint that is continued (0: none). Returns a sentence for each such difference;
    raises InputError, naming the part, for one that was not allowed.
    """
    path = run / IDENTITY
    said: list[str] = []
    known: dict[str, Any] = {}
    if path.exists():
        try:
            known = read_json(path)
            names = [*known["parts"], *(change["part"] for change in known["changes"] if "after" in change)]
            _ = dict(known["parts"]), [dict(change)["after"] for change in known["changes"]], "".join(names)
        except (InputError, KeyError, TypeError, ValueError) as error:
            said.append(f"{path}: damaged ({error}); kept as {run.set_aside(IDENTITY).name}, nothing to compare with")
            known = {}
    if not known and step:  # begun by an older version
        facts = run.facts() if run.is_run else {}
        old = {"training data": facts.get("data_fingerprint"), "starting student": facts.get("initial_weights")}
        known = {"parts": {**parts, **{part: value for part, value in old.items() if value}}, "changes": []}
    if not known or not step:
        write_json(path, {"format": 1, "parts": dict(parts), "changes": []}, checked=True)
        return said
    now = dict(known["parts"])
    for change in known["changes"]:
        now[change["part"]] = change["after"]
    differing = [part for part in sorted({*now, *parts}) if now.get(part) != parts.get(part)]
    if differing and not allow_changes:
        part = differing[0]
        verb = "is" if len(differing) == 1 and not part.endswith("images") else "are"
        raise InputError(
            f"{'; '.join([*said, str(run.path)])}: the {' and the '.join(differing)} {verb} not what the run "
            f"began with ({part}: fingerprint {str(now.get(part))[:12]}, now {str(parts.get(part))[:12]}): bring the "
            "old back, give another --out, or --allow-changes to go on with the new, which is recorded"
        )
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for part in differing:
        said.append(f"another {part} than the run began with; recorded in {IDENTITY}")
        known["changes"].append(
            {"part": part, "step": step, "time": when, "before": now.get(part), "after": parts.get(part)}
        )
    if differing or not path.exists():
        write_json(path, {"format": 1, **known}, checked=True)
    return said
