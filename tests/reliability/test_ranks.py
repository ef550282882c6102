"""Rows 13, 17, 18 and 20 on several processes (gloo): agreement, stopping, other numbers of ranks, lost ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.reliability.support import (
    LIMIT,
    STEPS,
    Launcher,
    newest_step,
    ranks,
    require_same_run,
    training,
    wait_for,
)


@pytest.fixture(scope="module")
def two_ranks(launcher: Launcher, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that nothing happened to."""
    out = tmp_path_factory.mktemp("ranks") / "run"
    for child in ranks(launcher, 2, *training(models, out)):
        child.finish()
    return out


def test_rows_17_18_one_rank_is_asked_to_stop_and_all_go_on_together(
    launcher: Launcher, models: Path, two_ranks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    children = ranks(launcher, 2, *training(models, out))
    assert wait_for(out, "checkpoints/step-00000002", children[0])
    children[1].send(signal.SIGTERM)
    said = [child.finish(75) for child in children]
    assert "a signal on another rank" in said[0]
    assert "SIGTERM" in said[1]
    assert newest_step(out) is not None
    for child in ranks(launcher, 2, *training(models, out)):
        child.finish()
    require_same_run(two_ranks, out)


def test_row_18_another_number_of_ranks_sees_the_same_samples_once(
    launcher: Launcher, models: Path, tmp_path: Path
) -> None:
    seen: dict[str, dict[int, list[str]]] = {}
    for name, count in (("one", 1), ("mixed", 2)):
        out, notes = tmp_path / name, tmp_path / f"{name}.jsonl"
        steps = f"train.steps={STEPS}"
        started = ranks(launcher, count, *training(models, out, steps), fault="note_batches", path=str(notes))
        if count == 2:
            assert wait_for(out, "checkpoints/step-00000003", started[0])
            started[0].send(signal.SIGTERM)
            codes = {child.wait() for child in started}
            assert codes == {75}
            saved = newest_step(out)
            assert saved is not None
            assert saved < STEPS
            launcher.start(*training(models, out, steps), fault="note_batches", path=str(notes)).finish()
        else:
            started[0].finish()
        seen[name] = {}
        for line in sorted(json.loads(text) for text in notes.read_text().splitlines()):
            seen[name].setdefault(line[0], []).extend(line[2])
    assert seen["mixed"] == seen["one"]
    described = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "mixed")]
    assert described[0]["samples_seen"] == described[1]["samples_seen"] == 8 * STEPS


def test_row_13_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(
    launcher: Launcher, models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    children = ranks(launcher, 2, *training(models, out), fault="nan_gradient", step=2, rank=1)
    for child in children:
        child.finish()
    assert json.loads((out / "run.json").read_text())["skipped_steps"] == 1
    captured = sorted(path.name for path in (out / "skipped_steps").glob("*.json"))
    assert captured == ["step-00000002-rank-0.json", "step-00000002-rank-1.json"]
    said = launcher.start("replay", out).finish()  # both ranks' parts are one batch again
    assert "8 samples" in said
    assert "captured on 2 ranks" in said
    assert "all finite" in said  # the fault was put into the rank, not into the data


def test_row_20_a_killed_rank_is_named_and_nothing_is_lost(
    launcher: Launcher, models: Path, two_ranks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    children = ranks(launcher, 2, *training(models, out), fault="die", step=3, rank=1)
    assert children[1].wait() == -signal.SIGKILL
    said = " ".join(children[0].finish(76).split())
    # which call meets the loss first, and whether the system still shows the process then, is a matter of moments
    assert "rank 0: lost the other ranks while" in said
    assert "run the same command again" in said
    assert newest_step(out) == 3
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    for child in ranks(launcher, 2, *training(models, out)):
        child.finish()
    require_same_run(two_ranks, out)


def test_row_20_a_rank_that_does_not_answer_ends_the_run_after_the_timeout(
    launcher: Launcher, models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = training(models, out, "train.rank_timeout=4")
    children = ranks(launcher, 2, *settings, fault="stall", step=2, rank=1, seconds=600.0)
    said = " ".join(children[0].finish(76).split())
    assert f"rank 1 (process {children[1].pid}) is running but does not answer" in said
    assert newest_step(out) == 2
    children[1].send(signal.SIGKILL)
    children[1].wait()


def test_row_20_waiting_for_a_long_evaluation_is_not_a_stall(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = training(models, out, "train.rank_timeout=3", "train.steps=3")
    children = ranks(launcher, 2, *settings, fault="slow_evaluation", seconds=4.0)
    for child in children:
        child.finish()


def test_row_12_ranks_refuse_together(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("keep me")
    children = ranks(launcher, 2, *training(models, tmp_path / "run"))
    assert all("not empty" in child.finish(2) for child in children)


@pytest.mark.slow
def test_row_18_three_ranks_resume_to_the_bit(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    """Sums over three ranks depend on their order, which must be the same after a resume."""
    for child in ranks(launcher, 3, *training(models, tmp_path / "whole")):
        child.finish()
    children = ranks(launcher, 3, *training(models, tmp_path / "parts"))
    assert wait_for(tmp_path / "parts", "checkpoints/step-00000003", children[0])
    children[2].send(signal.SIGTERM)
    for child in children:
        child.finish(75)
    for child in ranks(launcher, 3, *training(models, tmp_path / "parts")):
        child.finish()
    require_same_run(tmp_path / "whole", tmp_path / "parts")


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*command, "-m", "clipdistill.cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The ranks that torchrun started."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(number) for number in found]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the ranks in /proc")
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_rows_17_20_under_torchrun(models: Path, two_ranks: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "run"
    process = torchrun(*training(models, out))
    while not (out / "checkpoints" / "step-00000002").exists():
        assert process.poll() is None
        time.sleep(0.005)
    if how == "stop":
        for number in workers_of(process):  # what a scheduler does with the processes of a job
            os.kill(number, signal.SIGTERM)
    else:
        os.kill(workers_of(process)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=4 * LIMIT)
    assert process.returncode != 0
    if how == "stop":
        assert "exitcode  : 75" in said, said[-4000:]
    else:
        assert "has ended" in " ".join(said.split()), said[-4000:]
    saved = newest_step(out)
    assert saved is not None
    again = torchrun(*training(models, out))
    said, _ = again.communicate(timeout=4 * LIMIT)
    assert again.returncode == 0, said[-4000:]
    require_same_run(two_ranks, out)


PLUGIN = """
import json, os
import clipdistill as cd

class Noting:
    def on_step(self, view):
        with open({path!r} + os.environ.get("RANK", "0"), "a") as file:
            file.write(json.dumps([{word!r}, view.step]) + "\\n")

cd.register_callback("noting", Noting)
"""


def test_a_plug_in_with_callbacks_is_part_of_the_identity_on_every_rank(
    launcher: Launcher, models: Path, tmp_path: Path
) -> None:
    """Changed between stop and resume: refused by all ranks, or let through and recorded once; no step twice."""
    out, plugin, told = tmp_path / "run", tmp_path / "own.py", str(tmp_path / "told-")
    command = [*training(models, out, "callbacks=[noting]"), "--plugin", str(plugin)]
    plugin.write_text(PLUGIN.format(path=told, word="first"))
    for child in ranks(launcher, 2, *command, fault="stop_at", step=2):
        child.finish(75)
    stopped = newest_step(out)
    before = (out / "identity.json").read_bytes()
    plugin.write_text(PLUGIN.format(path=told, word="second"))
    for child in ranks(launcher, 2, *command):
        assert "the plug-in own.py is not what the run began with" in child.finish(2)
    assert (out / "identity.json").read_bytes() == before
    assert newest_step(out) == stopped
    for child in ranks(launcher, 2, *command, "--allow-changes"):
        child.finish()
    changes = json.loads((out / "identity.json").read_text())["changes"]
    assert [change["part"] for change in changes] == ["plug-in own.py"]
    notes = [json.loads(line) for line in Path(told + "0").read_text().splitlines()]
    assert [step for _, step in notes] == list(range(1, STEPS + 1))
    assert {word for word, step in notes if step > (stopped or 0)} == {"second"}
