"""Options of the loop that need something extra: compilation, TensorBoard, Weights & Biases."""

import builtins

import pytest
import torch
from safetensors.torch import load_file

from clipdistill.errors import MissingExtraError
from clipdistill.train.config import resolve
from clipdistill.train.logs import TensorBoard, WeightsAndBiases
from clipdistill.train.run import distill
from clipdistill.train.setup import build


@pytest.fixture
def nothing_extra(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "wandb" or name.endswith("tensorboard"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_missing_extras_say_what_to_install(tmp_path, nothing_extra):
    with pytest.raises(MissingExtraError, match=r"pip install 'clipdistill\[tensorboard\]'"):
        TensorBoard(tmp_path)
    with pytest.raises(MissingExtraError, match=r"pip install 'clipdistill\[wandb\]'"):
        WeightsAndBiases(tmp_path, "project", "run", {})


def test_tensorboard_receives_every_term(tmp_path):
    pytest.importorskip("tensorboard")
    log = TensorBoard(tmp_path)
    log.record("train", {"step": 3, "total": 1.5, "terms": {"task": 1.0, "xrd": 0.5}})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/total", "train/terms/task", "train/terms/xrd"} <= set(events.Tags()["scalars"])
    assert events.Scalars("train/terms/xrd")[0].value == 0.5


def test_fast_pixels_are_nearly_the_exact_ones(tmp_path):
    """The setting reaches the loader, and what it hands out is within rounding of the exact pixels."""
    batches = {}
    for pixels in ("exact", "fast"):
        config = resolve("clip", {"out": str(tmp_path / pixels)}, size="debug", assignments=[f"train.pixels={pixels}"])
        batches[pixels] = next(iter(build(config, torch.device("cpu")).loader(0)))
    assert batches["exact"].keys == batches["fast"].keys
    difference = (batches["exact"].student_images - batches["fast"].student_images).abs()
    assert 0 < difference.max() < 0.05  # in units of a standard deviation of pixels, about 64 of 255


@pytest.mark.slow
def test_a_compiled_student_learns_the_same(tmp_path):
    students = []
    for compiled in ("false", "true"):
        out = tmp_path / compiled
        config = resolve("clip-kd", {"out": str(out)}, size="debug", assignments=[f"train.compile={compiled}"])
        students.append(load_file(distill(config, quiet=True).student / "model.safetensors"))
    assert students[0].keys() == students[1].keys()
    largest = max((students[0][k] - students[1][k]).abs().max().item() for k in students[0])
    assert largest < 2e-3
