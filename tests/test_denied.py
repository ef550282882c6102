"""A user without rights: places that may not be written, files and folders that may not be read, in every command.

The commands run one after the other in one process; root's is without the right to pass over permissions.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY

KEPT = REPOSITORY / "tests" / "kept"
CHILD = """
import contextlib, io, json, sys, traceback
import torch
torch.set_num_threads(1)
from clipdistill import cli
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(json.loads(line))
        except SystemExit as error:
            code = error.code
        except BaseException:
            code = traceback.format_exc()
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
WRITING = [
    "train --recipe clip --size debug --out PLACE/run train.steps=1",
    "ablate --recipe clip --size debug --seeds 1 --out PLACE/a train.steps=1",
    "demo --out PLACE/d --seconds 20",
    "scenes --out PLACE/s --size 10 --workers 1",
    "cache --teacher scenes-teacher --data scenes:train --out PLACE/c --device cpu --quiet data.size=8",
    "cache merge PLACE/m HERE/cache HERE/cache",
    "embed RUN --data scenes:val?size=4 --out PLACE/e.npy",
    "eval RUN --data scenes:val?size=4 --json PLACE/s.json",
    "eval RUN --data scenes:val?size=4 --geometry PLACE/g.json",
    "claims published RUN --json PLACE/c.json",
    "compare RUN RUN --json PLACE/c.json",
    "report RUN --out PLACE/r.html",
    "bench RUN --batch 1 --seconds 0.05 --rounds 3 --json PLACE/b.json",
    "export RUN --to open_clip --out PLACE/x",
    "search HERE/photos --model RUN --index PLACE/i --query red",
    "regions boxes --data scenes:val?size=4 --detector grid --out PLACE/b",
]
READING = [
    *(f"eval RUN --data CLOSED/data{ending}" for ending in (".csv", ".json", ".tar", ".parquet", ".npz", "")),
    "eval LOST --data scenes:val?size=4",
    "eval CLOSED/model.safetensors --data scenes",
    "eval onnx:CLOSED/data --data scenes",
    "eval hf:CLOSED/data --data scenes",
    "eval RUN --data HERE/all_closed",
    "eval RUN --data HERE/classes",
    "eval RUN --data HERE/two_classes",
    "report LOST --out HERE/w/r.html",
    "report NOLOG --out HERE/w/r.html",
    "compare RUN LOST",
    "claims published LOST",
    "claims CLOSED/data.yaml RUN",
    "bench LOST",
    "replay LOST",
    "export LOST --to open_clip --out HERE/w/x",
    "embed LOST --data scenes:val?size=4 --out HERE/w/e.npy",
    "embed RUN --texts CLOSED/data.txt --out HERE/w/e.npy",
    "search CLOSED/data --model RUN --query red",
    "search HERE/photos --model LOST --query red",
    "search HERE/photos --model RUN --index HERE/w/i --image CLOSED/data.jpg",
    "train --recipe CLOSED/data.yaml --out HERE/w/t --data scenes",
    "train --recipe clip --size debug --plugin CLOSED/data.py --out HERE/w/t",
    "train --recipe clip-rd --size debug --teacher LOST --out HERE/w/t train.steps=1",
    "train --recipe clip-rd --size debug --teacher cache:LOSTCACHE --out HERE/w/t train.steps=1",
    "train --recipe clip --size debug --out LOST train.steps=1",
    "cache info LOSTCACHE",
    "eval RUN --data HERE/no_entry/x.csv",
    "train --recipe clip --size debug --data HERE/no_entry/x.json --out HERE/w/t train.steps=1",
    "probe RUN --train HERE/two_classes --test HERE/two_classes",
    "probe LOST --train HERE/classes --test HERE/classes",
    "serve LOST --port 0",
    "export LOST --to web --out HERE/w/x",
    "cache verify LOSTCACHE",
    "cache merge HERE/w/m LOSTCACHE HERE/cache",
    "ablate CLOSED/data.yaml --out HERE/w/a",
    "regions boxes --data CLOSED/data --detector grid --out HERE/w/b",
]
COUNTED = {
    "eval RUN --data HERE/mixed": "1.jpg",
    "eval RUN --data HERE/mixed_tars": "1 unreadable shard",
    "search HERE/mixed --model RUN --index HERE/w/i2 --query red": "1.jpg",
    "embed RUN --data HERE/mixed --out HERE/w/e2.npy": "1.jpg",
}
"""What is used without a part, and the name that is told."""


class Denied:
    """One process without rights, and the folder with what it is given."""

    def __init__(self, here: Path, process: subprocess.Popen[str]) -> None:
        self.here, self.process = here, process

    def run(self, command: str, place: str = "") -> tuple[int | str, str, str]:
        words = {
            "PLACE": place, "HERE": str(self.here), "RUN": str(self.here / "run"), "CLOSED": str(self.here / "closed"),
            "LOSTCACHE": str(self.here / "lost_cache"), "LOST": str(self.here / "lost"),
            "NOLOG": str(self.here / "no_log"),
        }  # fmt: skip
        for word, value in words.items():
            command = command.replace(word, value)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command.split()) + "\n")
        self.process.stdin.flush()
        code, out, err = json.loads(self.process.stdout.readline())
        return code, out, err


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)


def fill(here: Path) -> None:
    for name in ("run", "lost", "no_log"):
        shutil.copytree(KEPT / "run", here / name)
    for name in ("cache", "lost_cache"):
        shutil.copytree(KEPT / "cache-int8", here / name)
    for folder in ("photos", "mixed", "all_closed", "classes/cat", "classes/dog", "two_classes/cat", "two_classes/dog",
                   "two_classes/bird"):  # fmt: skip
        for number in range(3):
            picture(here / folder / f"{number}.jpg", number)
            if folder in ("mixed", "all_closed"):
                (here / folder / f"{number}.txt").write_text(f"a red square {number}")
    (here / "mixed_tars").mkdir()
    for shard in range(2):
        with tarfile.open(here / "mixed_tars" / f"{shard}.tar", "w") as tar:
            for name in ("0.jpg", "0.txt"):
                content = (here / "mixed" / name).read_bytes()
                member = tarfile.TarInfo(f"{shard}{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for name in ("closed/data", "w", "read_only", "no_entry"):
        (here / name).mkdir(parents=True)
    for ending in (".csv", ".json", ".tar", ".parquet", ".npz", ".txt", ".yaml", ".py", ".jpg"):
        (here / "closed" / f"data{ending}").write_text("filepath,title\n")
    shutil.copy(here / "run/student/model.safetensors", here / "closed")
    closed = [*(here / "closed").iterdir(), *(here / "all_closed").glob("*.jpg"), here / "mixed/1.jpg"]
    closed += [
        here / "mixed_tars/1.tar",
        here / "classes/dog",
        here / "two_classes/dog",
        here / "lost_cache/manifest.json",
    ]
    closed += [here / "lost" / name for name in ("run.json", "recipe.yaml", "scores.json", "student/model.safetensors")]
    for path in [*closed, here / "no_log/log.jsonl", here / "no_entry"]:
        path.chmod(0)
    (here / "read_only").chmod(0o555)


@pytest.fixture(scope="module")
def denied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Denied]:
    if os.name != "posix":
        pytest.skip("needs permissions")
    command = [sys.executable, "-c", CHILD]
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root passes over permissions, and setpriv is not here to take that right away")
        command = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", *command]
    here = tmp_path_factory.mktemp("denied")
    fill(here)
    environment = {**os.environ, "COLUMNS": "1000", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src"),
                   "CLIPDISTILL_CACHE": str(here / "w" / "own")}  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    yield Denied(here, process)
    process.kill()
    process.communicate()
    for path in here.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755)


def require_one_sentence(code: int | str, said: str, command: str) -> None:
    own = [line for line in said.splitlines() if line.startswith("clipdistill:")]
    assert code == 2, (command, code, said)
    assert len(own) == 1, said
    assert "the the" not in own[0]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("place", ["read_only", "read_only/further/down", "no_entry"])
@pytest.mark.parametrize("command", WRITING, ids=lambda command: command[:30])
def test_places_that_may_not_be_written_are_one_sentence(command: str, place: str, denied: Denied) -> None:
    code, _, said = denied.run(command, str(denied.here / place))
    require_one_sentence(code, said, command)
    assert place.split("/")[0] in said


@pytest.mark.parametrize("command", READING, ids=lambda command: command[:60])
def test_what_may_not_be_read_is_one_sentence(command: str, denied: Denied) -> None:
    code, _, said = denied.run(command)
    require_one_sentence(code, said, command)
    assert "no such file" not in said.lower()
    assert "not found" not in said.lower()


@pytest.mark.parametrize("command", COUNTED, ids=lambda command: command[:40])
def test_a_part_that_may_not_be_read_is_told(command: str, denied: Denied) -> None:
    code, out, said = denied.run(command)
    assert code in (0, 2), said
    assert COUNTED[command] in out + said, out + said
