"""Checkpoints: whole or absent, checked when read, restored to the bit."""

import errno
import json
import pickle

import pytest
import torch
from torch import nn

from clipdistill.errors import ClipdistillError, InputError, StorageError
from clipdistill.models import build_student
from clipdistill.runtime.files import with_checksum
from clipdistill.train import checkpoint as cp


@pytest.fixture(scope="module")
def student():
    return build_student("scenes-student", seed=0, captions=["a red circle"])


def training_parts(student):
    objective = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW([{"params": student.module.parameters()}, {"params": objective.parameters()}])
    for p in (*student.module.parameters(), *objective.parameters()):
        p.grad = torch.full_like(p, 0.5)
    optimiser.step()
    return objective, optimiser


def test_round_trip_is_exact(student, tmp_path):
    objective, optimiser = training_parts(student)
    cp.save_checkpoint(tmp_path, student, {"objective": objective}, optimiser, {"step": 5, "window": {}}, keep=2)
    other = build_student("scenes-student", seed=1, captions=["a red circle"])
    other_objective, other_optimiser = training_parts(other)
    found, rejected = cp.newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 5
    assert rejected == []
    cp.restore(found, other.module, {"objective": other_objective}, other_optimiser)
    for a, b in zip(student.module.state_dict().values(), other.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    before, after = optimiser.state_dict()["state"], other_optimiser.state_dict()["state"]
    assert before.keys() == after.keys()
    for index in before:
        for name in before[index]:
            assert torch.equal(torch.as_tensor(before[index][name]), torch.as_tensor(after[index][name]))


def test_a_checkpoint_written_behind_the_steps_is_that_of_its_own_step(student, tmp_path):
    """What changes while it is written stays out of it: weights, moments and counters."""
    objective, optimiser = training_parts(student)
    state = {"step": 5, "window": {"total": 1.0}}
    cp.save_checkpoint(tmp_path / "at once", student, {"objective": objective}, optimiser, state, keep=1)
    writer = cp.CheckpointWriter(tmp_path / "behind", keep=1)
    before = {name: t.clone() for name, t in student.module.state_dict().items()}
    writer.start(student, {"objective": objective}, optimiser, state)
    state["window"]["total"] = 2.0
    optimiser.step()
    for tensor in objective.parameters():
        tensor.data.zero_()
    assert writer.finished() == tmp_path / "behind" / "step-00000005"
    assert writer.finished() is None
    files = [path.relative_to(tmp_path / "at once") for path in (tmp_path / "at once").rglob("*") if path.is_file()]
    assert files
    for file in files:
        assert (tmp_path / "behind" / file).read_bytes() == (tmp_path / "at once" / file).read_bytes(), file
    student.module.load_state_dict(before)


def test_what_stops_the_writing_is_raised_to_the_run(student, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    objective, optimiser = training_parts(student)
    writer = cp.CheckpointWriter(tmp_path, keep=1)
    writer.start(student, {"objective": objective}, optimiser, {"step": 1})
    writer.finished()
    monkeypatch.setattr(cp, "save_file", full)
    writer.start(student, {"objective": objective}, optimiser, {"step": 2})
    with pytest.raises(StorageError, match="last good checkpoint is kept"):
        writer.finished()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert writer.finished() is None


def test_without_memory_for_a_copy_the_checkpoint_is_written_at_once(student, tmp_path, monkeypatch):
    objective, optimiser = training_parts(student)
    monkeypatch.setattr(cp, "free_memory", lambda: 1000)
    writer = cp.CheckpointWriter(tmp_path, keep=1)
    writer.start(student, {"objective": objective}, optimiser, {"step": 1})
    assert writer.done
    assert cp.newest_checkpoint(tmp_path)[0].step == 1
    writer.finished()


def test_only_the_newest_are_kept(student, tmp_path):
    objective, optimiser = training_parts(student)
    for step in (1, 2, 3):
        cp.save_checkpoint(tmp_path, student, {"objective": objective}, optimiser, {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("victim", ["student/model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(student, tmp_path, victim):
    objective, optimiser = training_parts(student)
    for step in (1, 2):
        cp.save_checkpoint(tmp_path, student, {"objective": objective}, optimiser, {"step": step}, keep=2)
    path = tmp_path / "step-00000002" / victim
    path.write_bytes(path.read_bytes()[:-3])
    found, rejected = cp.newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(rejected) == 1
    assert "step-00000002" in rejected[0]


def test_one_flipped_bit_is_noticed(student, tmp_path):
    objective, optimiser = training_parts(student)
    folder = cp.save_checkpoint(tmp_path, student, {"objective": objective}, optimiser, {"step": 1}, keep=1)
    path = folder / "student" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert cp.newest_checkpoint(tmp_path)[0] is None


def test_half_written_folders_are_ignored_and_removed(student, tmp_path):
    objective, optimiser = training_parts(student)
    (tmp_path / ".writing-step-00000009" / "student").mkdir(parents=True)
    assert cp.newest_checkpoint(tmp_path) == (None, [])
    cp.save_checkpoint(tmp_path, student, {"objective": objective}, optimiser, {"step": 1}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_another_format_version_is_refused(student, tmp_path):
    objective, optimiser = training_parts(student)
    folder = cp.save_checkpoint(tmp_path, student, {"objective": objective}, optimiser, {"step": 1}, keep=1)
    state = json.loads((folder / "state.json").read_text())
    state["format"] = 99
    del state["sha256"]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="checkpoint format 99"):
        cp.read_checkpoint(folder)


def test_another_architecture_is_refused_in_one_sentence(student, tmp_path):
    objective, optimiser = training_parts(student)
    folder = cp.save_checkpoint(tmp_path, student, {"objective": objective}, optimiser, {"step": 1}, keep=1)
    with pytest.raises(InputError, match="another architecture") as caught:
        cp.restore(cp.read_checkpoint(folder), nn.Linear(2, 2), {"objective": objective}, optimiser)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_reported_before_anything_is_written(student, tmp_path, monkeypatch):
    objective, optimiser = training_parts(student)
    cp.save_checkpoint(tmp_path, student, {"objective": objective}, optimiser, {"step": 1}, keep=1)
    full = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(cp.shutil, "disk_usage", lambda path: full)
    with pytest.raises(ClipdistillError, match="last good checkpoint is kept"):
        cp.save_checkpoint(tmp_path, student, {"objective": objective}, optimiser, {"step": 2}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_checkpoints_hold_no_pickle(student, tmp_path):
    objective, optimiser = training_parts(student)
    folder = cp.save_checkpoint(tmp_path, student, {"objective": objective}, optimiser, {"step": 1}, keep=1)
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.suffix in (".safetensors", ".json")
            with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError)):
                pickle.loads(path.read_bytes())


@pytest.mark.parametrize("apart", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_bit_of_the_state_is_noticed(student, tmp_path, apart):
    """Or it changes nothing: a blank for another blank."""
    objective, optimiser = training_parts(student)
    state = {"step": 1, "window": {"total": 0.1, "steps": 1.0}, "evaluation_due": False}
    folder = cp.save_checkpoint(tmp_path, student, {"objective": objective}, optimiser, state, keep=1)
    path = folder / "state.json"
    content = path.read_bytes()
    # one line, and without most of the files' checksums: the same text, short enough for every bit
    described = json.loads(content)
    described["optimizer_groups"] = described["optimizer_groups"][:1]
    described["files"] = dict(list(described["files"].items())[:2])
    content = json.dumps(with_checksum(described)).encode()
    path.write_bytes(content)
    good = cp._read_state(path)
    believed = []
    for bit in range(0, 8 * len(content), apart):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = cp._read_state(path)
        except cp.UnknownFormatError:
            believed.append(bit)  # it would not be passed over
        except InputError:
            continue
        else:
            believed += [] if found == good else [bit]
    assert believed == []


def test_a_checkpoint_of_the_version_before_is_read(student, tmp_path):
    objective, optimiser = training_parts(student)
    folder = cp.save_checkpoint(tmp_path, student, {"objective": objective}, optimiser, {"step": 1}, keep=1)
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]
    (folder / "state.json").write_text(json.dumps({**state, "format": 1}))
    assert cp.read_checkpoint(folder).step == 1
