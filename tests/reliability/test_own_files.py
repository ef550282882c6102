"""Every file of our own that is believed: whatever bit flips in it, it is refused in one sentence or means the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdistill import cli
from clipdistill.ablate.run import failures
from clipdistill.cache.blocks import BlockFolder
from clipdistill.errors import ClipdistillError, InputError
from clipdistill.models.exported import read_manifest
from clipdistill.models.save import read_description
from clipdistill.regions.box_file import open_folder
from clipdistill.report.data import read_optional, read_run
from clipdistill.runs.folder import RunFolder, run_folders
from clipdistill.runtime.files import read_json, write_json
from clipdistill.statistics.records import read_records
from clipdistill.statistics.scores import Scores
from clipdistill.train.checkpoint import read_checkpoint, save_checkpoint
from clipdistill.train.opening import check_identity
from clipdistill.train.replay import _records
from tests.fuzz.own_targets import PARTS, SAMPLES

KEPT = Path(__file__).parent.parent / "kept"
FLIPS = 100
"""Bits of a file that are tried, evenly over it; `pytest -m slow` tries them all."""
DEEP = b'{"a": ' * 100_000
SHAPES = [b"", b"\0", b"\0" * 400, b"\n", b"[]", b"[{}]", b"null", b"3", b"1e999", b'"text"', b"\xff\xfe{}", b"\x80",
          b"[" * 100_000, DEEP, b"9" * 5000, b"{", b'{"format": 1, "format": 1}', b'{"format": ' + b"9" * 5000 + b"}",
          b'{"format": 1e999}', b'{"format": NaN}', b'{"format": true}', b'\xef\xbb\xbf{"a" 1}', b"!!python/object:x {}"
          ]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 10**40, 1e308, float("nan"), float("inf"), "", "\0", "\ud800", "x" * 300, [], {}, [None],
]  # fmt: skip


def _identity(folder: Path) -> Any:
    said = check_identity(RunFolder(folder), PARTS, 4, False)
    if said:
        raise InputError(said[0])
    return read_json(folder / "identity.json")


def _optional(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        notices: list[str] = []
        found = [values for *_, values in read_optional([read_run(folder)], name, notices)]
        if notices:
            raise InputError(notices[0])
        return found

    return read


def _failure(folder: Path) -> Any:
    said = failures(folder)["a"]
    if "damaged" in said:
        raise InputError(said)
    return said


def _proposals(folder: Path) -> None:
    class Source:
        name = "scenes"

        def __len__(self) -> int:
            return 3

        def fingerprint(self) -> str:
            return str(SAMPLES["proposals.json"]["data_sha256"])

    open_folder(folder, Source(), {"format": 1, "detector": "grid", "detector_sha256": "aa"})  # type: ignore[arg-type]


READERS: dict[str, Callable[[Path], Any]] = {
    "run.json": lambda folder: RunFolder(folder).facts(),
    "recipe.yaml": lambda folder: RunFolder(folder).settings(),
    "identity.json": _identity,
    "scores.json": lambda folder: Scores.load(folder / "scores.json").to_json(),
    "scores.npz": lambda folder: [q.values for q in Scores.load(folder / "scores.json").queries.values()][0:0],
    "stages.json": lambda folder: [path.name for path in run_folders(folder / "many")],
    "ablation.json": lambda folder: [path.name for path in run_folders(folder / "many")],
    **{name: _optional(name) for name in ("claims.json", "bench.json", "geometry.json", "gallery.json")},
    "model.json": lambda folder: read_description(folder / "model.json"),
    "manifest.json": lambda folder: read_manifest(folder, "onnx:x")[0],
    "state.json": lambda folder: read_checkpoint(folder).state,
    "index.json": lambda folder: BlockFolder(folder, what="index", remedy="again", manifest="index.json").description(),
    "proposals.json": _proposals,
    "failure.json": _failure,
    "step.json": lambda folder: _records(folder, 3),
}
PLACES = {
    "stages.json": "many/stages.json", "ablation.json": "many/ablation.json", "failure.json": ".failures/a.json",
    "step.json": "skipped_steps/step-00000003-rank-0.json",
}  # fmt: skip


@pytest.fixture
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Callable[[Path], Any]]:
    """A folder with the file as this version writes it, the file, and what reads it."""
    name = request.param
    folder = tmp_path / "step-00000003" if name == "state.json" else tmp_path / "run"
    path = folder / PLACES.get(name, name)
    path.parent.mkdir(parents=True)
    for kept in ("run.json", "scores.json"):
        shutil.copy(KEPT / "run" / kept, folder / kept)
    if name in ("stages.json", "ablation.json"):
        (path.parent / "run").mkdir()
        (path.parent / "run" / "run.json").write_text("{}")
    if name == "run.json":
        RunFolder(folder).write_facts(json.loads((KEPT / "run" / name).read_text()))
    elif name == "recipe.yaml":
        shutil.copy(KEPT / "run" / name, path)
        RunFolder(folder).write_settings(RunFolder(folder).settings())
    elif name.startswith("scores"):
        Scores.load(KEPT / "run" / "scores.json").save(folder / "scores.json")
    elif name == "state.json":
        optimiser = torch.optim.AdamW(torch.nn.Linear(1, 1).parameters())
        state = {"step": 3, "samples": 48, "window": {}}
        save_checkpoint(folder.parent, None, {}, optimiser, state, 1)
    elif name in ("model.json", "manifest.json", "index.json"):
        model = read_json(KEPT / "run" / "student" / "model.json")
        model["tokenizer"]["words"] = model["tokenizer"]["words"][:5]
        write_json(path, {**model, "logit_scale": 14.3, "towers": {}}, checked=True)
    else:
        write_json(path, SAMPLES[name], checked=True)
    return folder, path, READERS[name]


def sampled(count: int, most: int) -> Iterator[int]:
    """`most` of the numbers below `count`, evenly."""
    step = max(1, count // most)
    yield from range(0, count, step | 1)  # odd, so that every bit of a byte has its turn


def outcome(read: Callable[[Path], Any], folder: Path) -> tuple[str, Any]:
    """('refused', sentence) or ('read', value); anything else fails."""
    try:
        return "read", read(folder)
    except ClipdistillError as error:
        said = str(error)
        assert said.strip()
        assert "\n" not in said.strip()
        assert len(said) < 1000
        return "refused", said
    finally:
        for aside in folder.glob("*.damaged-*"):
            aside.unlink()


def flips(whole: tuple[Path, Path, Callable[[Path], Any]], most: int) -> None:
    folder, path, read = whole
    content, value = path.read_bytes(), read(folder)
    for bit in sampled(8 * len(content), most):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        kind, found = outcome(read, folder)
        if kind == "read":
            assert without_checksum(found) == without_checksum(value), (
                f"bit {bit}: {bytes(changed)[bit // 8 - 20 :][:40]}"
            )
        else:
            assert path.name in found
            assert str(path.parent) in found


def without_checksum(value: Any) -> Any:
    """Without a key that was the checksum's before one of its bits flipped: 64 digits that nobody asks for."""
    if isinstance(value, list):
        return list(map(without_checksum, value))
    if not isinstance(value, dict):
        return value
    return {k: v for k, v in value.items() if not (len(str(v)) == 64 and len(k) <= 6)}


@pytest.mark.parametrize("whole", list(READERS), indirect=True, ids=str)
def test_a_flipped_bit_is_refused_or_means_the_same(whole: tuple[Path, Path, Callable[[Path], Any]]) -> None:
    flips(whole, FLIPS)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("whole", list(READERS), indirect=True, ids=str)
def test_every_flipped_bit_is_refused_or_means_the_same(whole: tuple[Path, Path, Callable[[Path], Any]]) -> None:
    flips(whole, 1 << 40)


@pytest.mark.parametrize("whole", list(READERS), indirect=True, ids=str)
def test_a_file_of_another_shape_or_cut_anywhere_is_one_sentence(
    whole: tuple[Path, Path, Callable[[Path], Any]],
) -> None:
    folder, path, read = whole
    content, value = path.read_bytes(), read(folder)
    for length in sampled(len(content), 30):
        path.write_bytes(content[:length])
        kind, found = outcome(read, folder)
        # what is cut behind the last brace or word is not missed
        assert kind == "refused" or found == value or path.suffix == ".yaml", length
        path.write_bytes(content[:length] + b"\0" * min(512, len(content) - length) + content[length + 512 :])
        kind, found = outcome(read, folder)
        assert kind == "refused" or found == value, length
    for shape in SHAPES:
        path.write_bytes(shape)
        kind, found = outcome(read, folder)
        assert kind == "refused" or shape.startswith((b'{"format"', b"9")) or path.suffix == ".yaml", shape[:40]


@pytest.mark.parametrize("whole", sorted({*READERS} - {"scores.npz", "recipe.yaml"}), indirect=True, ids=str)
@pytest.mark.sampled(2)
def test_any_value_of_any_type_under_any_key_is_read_or_one_sentence(
    whole: tuple[Path, Path, Callable[[Path], Any]],
) -> None:
    """Without a checksum, as older versions wrote them and as somebody may write them."""
    folder, path, read = whole
    values = read_json(path)
    if isinstance(values.get("format"), int):
        values["format"] = 1
    for place in places(values):
        for value in VALUES:
            changed = json.loads(json.dumps(values))
            node = changed
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = value
            path.write_text(json.dumps(changed))
            outcome(read, folder)


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in nested JSON there are values, lists by their first entry."""
    if path:
        yield path
    items = values.items() if isinstance(values, dict) else enumerate(values[:1]) if isinstance(values, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


COMMANDS: dict[str, tuple[str, ...]] = {
    "report": ("report", "RUN", "--out", "OUT.html"),
    "claims": ("claims", "published", "RUN", "--json", "OUT.json"),
    "compare": ("compare", "RUN", "RUN"),
    "eval": ("eval", "RUN", "--data", "scenes:val?size=8"),
    "replay": ("replay", "RUN"),
    "export": ("export", "RUN", "--to", "open_clip", "--out", "OUT"),
    "bench": ("bench", "RUN", "--batch", "1", "--seconds", "0.05", "--rounds", "1", "--json", "OUT.json"),
    "search": ("search", "FOLDER", "--model", "RUN", "--query", "a red square"),
}
HEAVY = ("eval", "export", "bench", "search")
FILES = ("run.json", "recipe.yaml", "scores.json", "scores.npz", "claims.json", "bench.json", "geometry.json",
         "gallery.json", "log.jsonl", "eval.jsonl", "bad_samples.jsonl", "identity.json", "student/model.json",
         )  # fmt: skip


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.slow if name in HEAVY else ()) for name in COMMANDS]
)
def test_every_command_reads_a_damaged_run_or_says_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    run = tmp_path / "run"
    shutil.copytree(KEPT / "run", run)
    (tmp_path / "photos").mkdir()
    for name in ("claims.json", "bench.json", "geometry.json", "gallery.json", "identity.json"):
        write_json(run / name, SAMPLES[name], checked=True)
    for name in FILES if command not in HEAVY else ("run.json", "recipe.yaml", "student/model.json"):
        content = (run / name).read_bytes() if (run / name).exists() else b""
        middle = len(content) // 2
        flipped = content[:middle] + bytes([(content[middle : middle + 1] or b"a")[0] ^ 1]) + content[middle + 1 :]
        for damaged in (b"", b"\0" * 300, b"[]", content[:middle], flipped, b"[" * 100_000, b"\xff\xfe")[
            slice(None, None, 2 if command in HEAVY else None)
        ]:
            (run / name).write_bytes(damaged)
            places_ = {"RUN": str(run), "FOLDER": str(tmp_path / "photos")}
            words = [places_.get(word, word.replace("OUT", str(tmp_path / "out"))) for word in COMMANDS[command]]
            code = cli.main(words)
            said = capsys.readouterr().err
            assert code in (0, 1, 2), (name, damaged[:20], said[-300:])
            assert "Traceback" not in said, (name, damaged[:20])
            assert code == 0 or "clipdistill" in said, (name, damaged[:20])
        (run / name).write_bytes(content)


def test_records_of_a_run_with_a_damaged_benchmark_name_the_file(tmp_path: Path) -> None:
    shutil.copytree(KEPT / "run", tmp_path / "run")
    write_json(tmp_path / "run" / "bench.json", SAMPLES["bench.json"], checked=True)
    whole = len(read_records([tmp_path / "run"]))
    text = (tmp_path / "run" / "bench.json").read_text()
    (tmp_path / "run" / "bench.json").write_text(text.replace("20.5", "21.5"))
    with pytest.raises(InputError, match=r"bench\.json: damaged or changed by hand"):
        read_records([tmp_path / "run"])
    assert whole > 0
