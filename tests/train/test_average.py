"""The running average of weights: by hand, and as what a run evaluates, saves and resumes."""

import pytest
import torch
from safetensors.torch import load_file

from clipdistill.errors import InputError, Preempted
from clipdistill.runs.folder import RunFolder, read_rows
from clipdistill.train.average import WeightAverage
from clipdistill.train.config import resolve
from clipdistill.train.run import distill
from tests.train.support import lines, signal_at


def test_by_hand():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = WeightAverage(layer, 0.3)
    expected = layer[0].weight.detach().clone()
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 0.3)):
        with torch.no_grad():
            layer[0].weight += step
        average.update()
        expected = decay * expected + (1 - decay) * layer[0].weight.detach()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with average.applied():
        torch.testing.assert_close(layer[0].weight.detach(), expected)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    other = WeightAverage(layer, 0.3)
    other.load_state_dict(average.state_dict())
    assert int(other.updates) == 3
    with other.applied():
        torch.testing.assert_close(layer[0].weight.detach(), expected)


def settings(out, *assignments):
    given = {"out": str(out), "train": {"steps": 6, "evaluate_every": 3, "keep_in_memory": True}}
    return resolve("clip-kd", given, size="debug", assignments=["train.ema_decay=0.9", *assignments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    return distill(settings(tmp_path_factory.mktemp("average") / "whole"), quiet=True)


def test_the_averaged_student_is_evaluated_saved_and_resumed_to_the_bit(whole, tmp_path, monkeypatch):
    saved = load_file(whole.student / "model.safetensors")
    newest = whole.folder / "checkpoints" / "step-00000006"
    average, last = load_file(newest / "average.safetensors"), load_file(newest / "student" / "model.safetensors")
    assert int(average.pop("updates")) == 6
    assert any(not torch.equal(saved[name], last[name]) for name in saved)
    for name, value in average.items():
        assert torch.equal(saved[name.replace("/", ".")], value), name
    assert RunFolder(whole.folder).facts()["averaged"] == {"decay": 0.9, "updates": 6}
    signal_at(monkeypatch, 4)
    with pytest.raises(Preempted):
        distill(settings(tmp_path / "parts"), quiet=True)
    parts = distill(settings(tmp_path / "parts"), quiet=True)
    again = load_file(parts.student / "model.safetensors")
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    one, other = (lines(run.folder / "eval.jsonl") for run in (whole, parts))
    assert len(one) == 2
    assert one == other


def test_an_average_changes_no_loss(whole, tmp_path):
    plain = resolve("clip-kd", {"out": str(tmp_path / "without"), "train": {"steps": 6}}, size="debug")
    runs = whole, distill(plain, quiet=True)
    one, other = ([row["total"] for row in read_rows(run.folder / "log.jsonl")] for run in runs)
    assert one == other


def test_masks_and_an_average_are_refused_together():
    with pytest.raises(InputError, match=r"train.ema_decay=0.9: not together with train.masks"):
        resolve("tinyclip-auto", {"out": "x"}, size="debug", assignments=["train.ema_decay=0.9"])


def test_scheduled_weights_are_in_the_log(tmp_path):
    config = resolve(
        "clip-kd",
        {
            "out": str(tmp_path / "run"),
            "objective": {"schedules": {"fd": [[0, 1.0], [0.5, 0.1]]}},
            "train": {"steps": 4},
        },
        size="debug",
    )
    distill(config, quiet=True)
    weights = [row["weights"]["fd"] for row in read_rows(tmp_path / "run" / "log.jsonl")]
    assert weights == pytest.approx([2000, 1100, 200, 200])
