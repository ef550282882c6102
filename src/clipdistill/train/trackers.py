"""Callbacks that send a run's numbers to other programs: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from clipdistill.config import as_dict
from clipdistill.errors import needing
from clipdistill.runtime.files import write_text
from clipdistill.train.callbacks import Callback, RunView


class Tracker(Callback):
    """Base of callbacks that send the numbers of log and curve elsewhere: `send(kind, numbers, step)`."""

    def send(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        """kind: "train", "eval" or "final"; numbers by joined names ("terms/xrd")."""
        raise NotImplementedError

    def on_step(self, run: RunView) -> None:
        if run.line is not None:
            self.send("train", flatten(run.line), run.step)

    def on_evaluation(self, run: RunView) -> None:
        self.send("eval", flatten({"step": run.step, "samples": run.samples, "scores": run.scores}), run.step)


class TensorBoard(Tracker):
    """Scalars for TensorBoard in `tensorboard/` of the run folder (extra `tensorboard`)."""

    def on_start(self, run: RunView) -> None:
        with needing("tensorboard", "tensorboard", "tensorboard: true"):
            from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)

    def send(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(f"{kind}/{name}", value, step)

    def on_end(self, run: RunView) -> None:
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A wandb run with the identity kept in the run folder, so that a resumed run continues it (extra `wandb`)."""

    def on_start(self, run: RunView) -> None:
        project = run.config.wandb or "clipdistill"
        with needing("wandb", "wandb", f"wandb: {project}"):
            import wandb
        known, name, config = _identity(run, "wandb-id.txt"), run.config.run_name, as_dict(run.config)
        self.run = wandb.init(project=project, name=name, id=known, resume="allow", config=config, dir=str(run.folder))
        write_text(run.folder / "wandb-id.txt", self.run.id)

    def send(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        self.run.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)

    def on_end(self, run: RunView) -> None:
        self.run.finish()


class MLflow(Tracker):
    """An MLflow run, continued when the training is resumed (extra `mlflow`). `mlflow: NAME` names the experiment.

    Where it is kept is MLflow's own setting, MLFLOW_TRACKING_URI.
    """

    def on_start(self, run: RunView) -> None:
        experiment = run.config.mlflow or "clipdistill"
        with needing("mlflow", "mlflow", f"mlflow: {experiment}"):
            from mlflow.tracking import MlflowClient
        self.client = MlflowClient()
        known = _identity(run, "mlflow-id.txt")
        if known is None:
            found = self.client.get_experiment_by_name(experiment)
            number = self.client.create_experiment(experiment) if found is None else found.experiment_id
            known = self.client.create_run(number, run_name=run.config.run_name).info.run_id
            write_text(run.folder / "mlflow-id.txt", known)
            for name, value in _leaves(as_dict(run.config)):
                self.client.log_param(known, name, str(value)[:500])
        else:
            self.client.update_run(known, status="RUNNING")
        self.id = known

    def send(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        import mlflow.entities as entities

        now = time.time_ns() // 1_000_000
        # its names take no @
        metrics = [entities.Metric(f"{kind}/{n}".replace("@", "_at_"), v, now, step) for n, v in numbers.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def on_end(self, run: RunView) -> None:
        self.send("final", flatten(run.final_scores), run.step)
        statuses = {"finished": "FINISHED", "stopped": "KILLED"}
        self.client.set_terminated(self.id, statuses.get(run.status, "FAILED"))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested mappings under joined names."""
    return {
        name: float(value)
        for name, value in _leaves(values, prefix)
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _identity(run: RunView, name: str) -> str | None:
    path = run.folder / name
    return path.read_text(encoding="utf-8", errors="replace").strip() or None if path.is_file() else None
