"""Options of the loop that need something extra: compilation, TensorBoard, Weights & Biases, MLflow."""

import builtins
import sys
import types
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from clipdistill.errors import MissingExtraError
from clipdistill.registry import CALLBACKS
from clipdistill.train.callbacks import RunView
from clipdistill.train.config import resolve
from clipdistill.train.run import distill
from clipdistill.train.setup import build


@pytest.fixture
def nothing_extra(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] in ("wandb", "mlflow") or name.endswith("tensorboard"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.fixture
def view(tmp_path):
    return RunView(resolve("clip", {"out": str(tmp_path / "run")}, size="debug"), tmp_path, 0, 6)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_missing_extras_say_what_to_install(view, nothing_extra, name):
    with pytest.raises(MissingExtraError, match=rf"pip install 'clipdistill\[{name}\]'"):
        CALLBACKS.get(name)().on_start(view)


def test_tensorboard_receives_every_term(view, tmp_path):
    pytest.importorskip("tensorboard")
    log = CALLBACKS.get("tensorboard")()
    log.on_start(view)
    log.on_step(replace(view, step=3, line={"step": 3, "total": 1.5, "terms": {"task": 1.0, "xrd": 0.5}}))
    log.on_evaluation(replace(view, step=3, scores={"t2i_R@1": 0.25}))
    log.on_end(view)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/total", "train/terms/task", "train/terms/xrd", "eval/scores/t2i_R@1"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Scalars("train/terms/xrd")[0].value == 0.5


class Client:
    """What MLflow's client keeps, in its own terms."""

    params, metrics, status = {}, [], None

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return f"experiment of {name}"

    def create_run(self, experiment, run_name):
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    def update_run(self, run, status):
        Client.status = status

    def log_param(self, run, name, value):
        Client.params[name] = value

    def log_batch(self, run, metrics):
        Client.metrics += metrics

    def set_terminated(self, run, status):
        Client.status = status


def test_mlflow_receives_settings_losses_and_scores(view, monkeypatch, tmp_path):
    for name in ("mlflow", "mlflow.tracking", "mlflow.entities"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mlflow.tracking"].MlflowClient = Client
    sys.modules["mlflow.entities"].Metric = lambda *parts: parts
    sys.modules["mlflow"].entities = sys.modules["mlflow.entities"]
    log = CALLBACKS.get("mlflow")()
    log.on_start(view)
    assert Client.params["train/steps"] == "3"
    assert (tmp_path / "mlflow-id.txt").read_text() == "r1"
    log.on_step(replace(view, step=3, line={"step": 3, "total": 1.5}))
    log.on_end(replace(view, step=3, status="finished", final_scores={"scenes/t2i_R@1": 0.5}))
    found = {name: (value, step) for name, value, _, step in Client.metrics}
    assert found["train/total"] == (1.5, 3)
    assert found["final/scenes/t2i_R_at_1"] == (0.5, 3)
    assert Client.status == "FINISHED"
    Client.params = {}
    log.on_start(view)  # a resumed run goes on with the same one
    assert Client.status == "RUNNING"
    assert Client.params == {}


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
