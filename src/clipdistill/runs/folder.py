"""What lies in a run folder: its one reader and writer. Light, and without knowledge of models.

run.json             what the run is and how far it got
recipe.yaml          every setting
identity.json        fingerprints of what it began with: data, teacher, student, tokenizer
log.jsonl            losses and speeds, a line every train.log_every steps
eval.jsonl           the learning curve
bad_samples.jsonl    samples that could not be used
scores.json, .npz    what the student was measured at, and its results query by query
student/             the trained model            checkpoints/, skipped_steps/    to go on from, to look into
.lock                who is training here
bench.json, geometry.json, gallery.json, claims.json, measured.json     written by other commands
stages.json, ablation.json                       in folders that stand for several runs
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clipdistill.config import read_yaml
from clipdistill.errors import InputError
from clipdistill.registry import load_plugin
from clipdistill.runtime.files import digest_of, is_inside, read_json, write_json, write_text

FORMAT = 1
RUN, RECIPE, IDENTITY, LOCK = "run.json", "recipe.yaml", "identity.json", ".lock"
LOG, CURVE, BAD_SAMPLES = "log.jsonl", "eval.jsonl", "bad_samples.jsonl"
SCORES, BENCH, CLAIMS, MEASURED = "scores.json", "bench.json", "claims.json", "measured.json"
STAGES, ABLATION = "stages.json", "ablation.json"
STUDENT, CHECKPOINTS = "student", "checkpoints"

_MARK = "# sha256 "
_HINT = "a run folder has one; is this the folder that `clipdistill train` wrote?"
_TEXTS = ("name", "recipe", "method", "kind", "status", "student", "data", "device", "dtype", "student_fingerprint",
          "settings_fingerprint")  # fmt: skip
_COUNTS = ("steps", "total_steps", "samples_seen", "seed", "bad_samples", "skipped_steps", "batch_size", "ranks")
_MAPPINGS = ("parameters", "teacher_parameters", "objective", "truncated", "versions")


@dataclass(frozen=True)
class Lines:
    """The objects of a .jsonl file with their line numbers (from 1), and the numbers of lines that are none.

    A last line that was cut short while it was written counts as `cut`, not as damaged.
    """

    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    cut: bool = False

    @property
    def values(self) -> list[dict[str, Any]]:
        return [row for _, row in self.rows]


def read_lines(path: Path | str) -> Lines:
    """A .jsonl file; nothing where there is none. Never fails on content: what is no JSON object is counted."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Lines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    found, texts = Lines(), content.split(b"\n")
    cut = -1
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            found.rows.append((number, row))
        elif number == len(texts) and text.startswith(b"{"):  # without its line end
            cut = number
        else:
            found.damaged.append(number)
    return Lines(found.rows, found.damaged, cut > 0)


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a .jsonl file alone."""
    return read_lines(path).values


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def is_run(self) -> bool:
        return (self.path / RUN).is_file()

    def facts(self, hint: str = _HINT) -> dict[str, Any]:
        """run.json, its values checked. Raises InputError for a file that is missing, damaged or of a newer version."""
        path = self.path / RUN
        values = read_json(path, hint)
        stored = values.get("format", FORMAT)
        if stored != FORMAT:
            raise InputError(
                f"{path}: format {stored!r}, this version reads {FORMAT}: go on with the version that wrote it"
            )
        for keys, kind, words in (
            (_TEXTS, str, "a text"),
            (_COUNTS, int, "a whole number"),
            (("seconds",), (int, float), "a number"),
            (_MAPPINGS, dict, "a mapping"),
        ):
            for key in keys:
                value = values.get(key)
                if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                    raise InputError(f"{path}: '{key}' must be {words}, found {value!r:.80}")
        return values

    def status(self) -> str | None:
        """ "running", "stopped", "failed" or "finished"; None where no run has begun."""
        return self.facts().get("status") if self.is_run else None

    def settings(self) -> dict[str, Any]:
        """recipe.yaml as it stands there. Raises InputError where it is damaged, or changed since it was written."""
        path = self.path / RECIPE
        values = read_yaml(path)
        text, _, recorded = path.read_text(encoding="utf-8").rpartition(_MARK)
        if text and recorded.strip() != digest_of({"text": text}):
            raise InputError(f"{path}: damaged or changed by hand (its checksum does not fit)")
        return values

    def write_settings(self, values: Mapping[str, Any]) -> None:
        """recipe.yaml, with a checksum in its last line."""
        text = yaml.safe_dump(dict(values), sort_keys=False)
        write_text(self.path / RECIPE, f"{text}{_MARK}{digest_of({'text': text})}\n")

    def load_plugins(self) -> list[str]:
        """Load the plug-ins that the run was trained with, and name them.

        Raises InputError for one that is missing or fails. Only files elsewhere, by their whole path: a folder that
        was copied here must not bring code to run.
        """
        try:
            values = self.settings()
        except InputError:  # missing or damaged: whoever opens the run says so
            return []
        plugins = values.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        for name in plugins:
            if not isinstance(name, str) or not Path(name).is_absolute() or is_inside(self.path, Path(name)):
                raise InputError(
                    f"{self.path / RECIPE}: the plug-in {name!r:.200} is not a whole path outside the run's folder, "
                    "so it is not loaded: give it as --plugin if you trust it"
                )
            load_plugin(name)
        return list(plugins)

    def log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl that can be read."""
        return read_lines(self.path / LOG).values

    def curve(self) -> list[dict[str, Any]]:
        """The points of the learning curve that can be read: step, samples, scores."""
        return [
            line
            for line in read_lines(self.path / CURVE).values
            if isinstance(line.get("step"), int) and isinstance(line.get("scores"), dict)
        ]

    def write_facts(self, values: Mapping[str, Any]) -> None:
        write_json(self.path / RUN, {"format": FORMAT, **values}, checked=True)

    def append(self, name: str, values: Mapping[str, Any]) -> None:
        """Add a line to a .jsonl file, in one write."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def rewrite(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace a .jsonl file in one step."""
        write_text(self.path / name, "".join(json.dumps(row) + "\n" for row in rows))

    def mend(self) -> list[str]:
        """Set aside .jsonl files with lines that are no objects, keeping the good lines; a sentence for each."""
        said = []
        for name in (LOG, CURVE, BAD_SAMPLES):
            found = read_lines(self.path / name)
            if found.damaged:
                aside = self.set_aside(name)
                self.rewrite(name, found.values)
                said.append(f"{name}: {len(found.damaged)} damaged lines left out; the file is kept as {aside.name}")
        return said

    def set_aside(self, name: str) -> Path:
        """Rename a damaged file so that it is kept and never read again; returns its new name."""
        path, number = self.path / name, 1
        while (aside := path.with_name(f"{name}.damaged-{number}")).exists():
            number += 1
        path.rename(aside)
        return aside


def stale_scores(facts: Mapping[str, Any], fingerprint: str) -> str | None:
    """Why scores measured on the model `fingerprint` are not those of the run with these `facts`; None if they are.

    Runs of older versions recorded no fingerprint of their student: theirs are believed.
    """
    if "student_fingerprint" not in facts or not fingerprint:
        return None
    if facts["student_fingerprint"] is None:
        return f"the run is {facts.get('status')}, and the scores are of a student before that"
    if facts["student_fingerprint"] != fingerprint:
        return "the scores are of other weights than the run's student (it was trained on, or replaced)"
    return None


def run_folders(folder: Path) -> list[Path]:
    """The run folders that `folder` stands for, in order: itself where it is a run.

    A run of stages stands for the stages that have begun, an ablation for its finished runs. A file stands for none,
    so that a pattern may be given for all runs beside each other (`runs/ablation/*`).
    """
    if folder.is_file():
        return []
    if (folder / ABLATION).is_file() and not (folder / RUN).is_file():
        variants = _objects(folder / ABLATION, "variants", "runs", list)
        runs = [_beside(folder / ABLATION, name) for variant in variants for name in variant["runs"]]
        if not runs:
            raise InputError(f"{folder}: none of the ablation's runs has finished")
        return runs
    if not (folder / STAGES).is_file():
        return [folder]
    stages = [_beside(folder / STAGES, entry["folder"]) for entry in _objects(folder / STAGES, "stages", "folder", str)]
    begun = [path for path in stages if (path / RUN).is_file()]
    if not begun:
        raise InputError(f"{folder}: none of its stages has begun")
    return begun


def _beside(path: Path, name: Any) -> Path:
    """The run's folder that a file names, which lies beside it. Raises InputError for what no folder can be called."""
    own = Path(str(name)).name
    if not own or "\0" in own or len(own.encode("utf-8", "surrogatepass")) > 255:
        raise InputError(f"{path}: names the run {own!r:.80}, and no folder is called that")
    return path.parent / own


def distinct(runs: Sequence[Path]) -> list[Path]:
    """The runs. Raises InputError where one is named twice: it would be counted as two training seeds."""
    seen: dict[Path, Path] = {}
    for run in runs:
        before = seen.setdefault(run.resolve(), run)
        if before is not run:
            raise InputError(f"{run}: named twice; a run counts once")
    return list(runs)


def _objects(path: Path, key: str, part: str, kind: type) -> list[dict[str, Any]]:
    entries = read_json(path).get(key)
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get(part), kind) for e in entries):
        raise InputError(f"{path}: expected a list of {key}, each with its '{part}'")
    return entries
