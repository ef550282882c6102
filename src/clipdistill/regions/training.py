"""Training a meta-teacher: the recipe's `meta_teacher:` part makes a run train this network instead of a student.

    clipdistill train --recipe dclip-teacher --teacher ViT-B-16/openai --data D --out runs/teacher regions.boxes=B

The CLIP is frozen and regions are embedded once, so a step is a small network and the text tower's forward pass: one
process is enough. Which samples and captions a step sees is a function of (seed, step), as in the main loop; the same
command continues an interrupted run to the same bits.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipdistill.data.sampler import steps_per_epoch
from clipdistill.errors import BudgetError, InputError, Preempted
from clipdistill.models.parameters import decays
from clipdistill.objective import Objective
from clipdistill.regions.meta_teacher import MetaTeacher
from clipdistill.regions.task import MEASURED, build_task, check_settings
from clipdistill.runtime.machine import pick_device
from clipdistill.runtime.signals import StopSignal
from clipdistill.train.config import RunConfig
from clipdistill.train.logs import Display, JsonLines
from clipdistill.train.optimiser import learning_rate_factor, set_learning_rate
from clipdistill.train.sources import Sources
from clipdistill.version import __version__

FORMAT = 1
CHECKPOINT = "checkpoint.safetensors"


@dataclass
class _Progress:
    step: int = 0
    samples: int = 0
    skipped: int = 0
    seconds: float = 0.0
    window: dict[str, float] = field(default_factory=dict)


def train_meta_teacher(config: RunConfig, *, explain: bool = False, quiet: bool = False) -> int:
    """Train the network that `config.meta_teacher` describes into `config.out`; returns the steps done in all.

    The run folder must have been opened. Writes student/ (the meta-teacher), log.jsonl, run.json and, with a
    validation set, measured.json. Raises InputError for unusable input, Preempted after a stop signal.
    """
    device = pick_device(config.device)
    run = _Run(config, device, quiet)
    if explain:
        run.display.say(run.objective.explain(config.train.batch_size, device, 1))
        return 0
    return run.train()


class _Run:
    """The parts of one training."""

    def __init__(self, config: RunConfig, device: torch.device, quiet: bool) -> None:
        check_settings(config.teachers, config.regions, config.objective)
        assert config.meta_teacher is not None
        assert config.regions is not None
        self.config, self.device = config, device
        train = config.train
        source = Sources().training(config)
        per_epoch = steps_per_epoch(len(source), train.batch_size)
        self.total = train.steps if train.steps is not None else max(round((train.epochs or 0) * per_epoch), 1)
        self.display = Display(config.run_name, self.total, 0, enabled=not quiet)
        self.task = build_task(
            config.teachers[0],
            config.meta_teacher,
            config.regions,
            source,
            Sources().validation(config),
            config.out,
            device,
            batch_size=train.batch_size,
            seed=train.seed,
            caption=train.caption,
            fixed_logit_scale=train.fixed_logit_scale,
            say=self.display.say,
        )
        self.teacher = self.task.teacher
        width = self.teacher.clip.embed_dim
        self.objective = Objective.from_config(config.objective, width, width).to(device)
        self.optimiser = _optimiser(self.teacher, self.objective, config)
        self.progress = _Progress()

    def train(self) -> int:
        config, out = self.config, self.config.out
        self._resume(out / CHECKPOINT)
        self._announce()
        log = JsonLines(out, self.progress.step)
        self._describe("running")
        began = time.monotonic() - self.progress.seconds
        with self.display, StopSignal() as stop:
            while self.progress.step < self.total:
                self._step()
                self.progress.seconds = time.monotonic() - began
                step, finished = self.progress.step, self.progress.step == self.total
                line = None
                if step % config.train.log_every == 0 or finished:
                    line = self._line()
                    log.record("train", line)
                self.display.update(step, line)
                every = config.train.checkpoint_every
                stopping = stop.received is not None and not finished
                if (every is not None and step % every == 0) or stopping:
                    self._save(out / CHECKPOINT)
                if stopping:
                    self._describe("stopped")
                    raise Preempted(
                        f"stopped by {stop.received} after step {step}; saved: run the same command again to go on"
                    )
        self.teacher.network.eval()
        self.teacher.save(out / "student")
        if self.task.validation is not None:
            self.display.say(f"measuring on {self.task.validation[0].name}")
        measured = self.task.measured()
        if measured is not None:
            (out / MEASURED).write_text(json.dumps(measured.to_json(), indent=1) + "\n", encoding="utf-8")
        (out / CHECKPOINT).unlink(missing_ok=True)
        self._describe("finished")
        if measured is not None and self.display.enabled:
            measured.table().print()
        return self.progress.step

    def _announce(self) -> None:
        config = self.config
        first, *rest = self.task.notes()
        for sentence in (
            f"{config.run_name}: {first}; {self.total} steps of {config.train.batch_size}",
            *rest,
        ):
            self.display.say(sentence)
        if self.progress.step:
            self.display.say(f"continuing {config.out} from step {self.progress.step}")

    def _step(self) -> None:
        train, progress = self.config.train, self.progress
        began = time.monotonic()
        indices, captions = self.task.batch(progress.step)
        self.optimiser.zero_grad(set_to_none=True)
        output = self.objective(self.task.embeddings(indices, captions))
        output.total.backward()
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, train.clip_grad_norm or math.inf))
        factor = learning_rate_factor(progress.step, self.total, train)
        progress.window["rate"] = set_learning_rate(self.optimiser, factor)
        value = float(output.total.detach())
        if math.isfinite(norm) and math.isfinite(value):
            self.optimiser.step()
            for name, term in (("total", value), ("gradient", norm), ("steps", 1.0)):
                progress.window[name] = progress.window.get(name, 0.0) + term
            for name, tensor in output.terms.items():
                key = f"term/{name}"
                progress.window[key] = progress.window.get(key, 0.0) + float(tensor)
        else:
            self._skip(captions)
        progress.step += 1
        progress.samples += len(indices)
        for name, number in (("seen", float(len(indices))), ("seconds", time.monotonic() - began)):
            progress.window[name] = progress.window.get(name, 0.0) + number

    def _skip(self, captions: list[str]) -> None:
        self.progress.skipped += 1
        if self.progress.skipped > self.config.train.max_skipped_steps:
            raise BudgetError(
                f"step {self.progress.step}: the loss or its gradient is not finite (first caption: '{captions[0]}'): "
                "try a lower train.learning_rate or train.clip_grad_norm=1"
            )

    def _line(self) -> dict[str, Any]:
        """Means since the last line, in the form of the main loop's log."""
        sums, self.progress.window = self.progress.window, {}
        count = max(sums.get("steps", 0.0), 1.0)
        return {
            "step": self.progress.step,
            "epoch": round(self.progress.step / self.task.sampler.steps_per_epoch, 4),
            "samples": self.progress.samples,
            "total": sums.get("total", math.nan) / count,
            "terms": {k.removeprefix("term/"): v / count for k, v in sums.items() if k.startswith("term/")},
            "learning_rate": sums["rate"],
            "grad_norm": sums.get("gradient", math.nan) / count,
            "logit_scale": self.task.scale,
            "samples_per_second": sums["seen"] / max(sums["seconds"], 1e-9),
            "data_wait": 0.0,
            "skipped_steps": self.progress.skipped,
            "seconds": round(self.progress.seconds, 3),
        }

    def _save(self, path: Path) -> None:
        """Network, objective and moments in one file that is whole or not there."""
        names = {id(p): name for name, p in self._trained().items()}
        tensors = {f"weights.{k}": v for k, v in self._state().items()}
        for group in self.optimiser.param_groups:
            for parameter in group["params"]:
                for key, value in self.optimiser.state.get(parameter, {}).items():
                    tensors[f"moments.{names[id(parameter)]}.{key}"] = value
        stored = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        temporary = path.with_name(f".{path.name}.writing")
        save_file(stored, temporary, {"format": str(FORMAT), "progress": json.dumps(vars(self.progress))})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)

    def _resume(self, path: Path) -> None:
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            progress = _Progress(**json.loads(metadata["progress"]))
            own = self._state()
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(tensors[f"weights.{name}"])
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: not a checkpoint of this run ({error}): remove it to start anew") from error
        for name, parameter in self._trained().items():
            keys = [key for key in tensors if key.startswith(f"moments.{name}.")]
            moments = {key.rsplit(".", 1)[1]: tensors[key] for key in keys}
            if moments:  # the step counter stays on the CPU, as AdamW keeps it
                self.optimiser.state[parameter] = {
                    key: value if key == "step" else value.to(self.device) for key, value in moments.items()
                }
        self.progress = progress

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        parts = (("network", self.teacher.network), ("objective", self.objective))
        return {f"{part}.{name}": p for part, module in parts for name, p in module.named_parameters()}

    def _state(self) -> dict[str, Tensor]:
        parts = (("network", self.teacher.network), ("objective", self.objective))
        return {f"{part}.{name}": t for part, module in parts for name, t in module.state_dict().items()}

    def _describe(self, status: str) -> None:
        """run.json, in the main loop's form."""
        config, progress = self.config, self.progress
        described = {
            "format": FORMAT,
            "name": config.run_name,
            "recipe": config.recipe,
            "method": config.method or Path(config.recipe).stem,
            **self.task.facts(),
            "data": self.task.source.name,
            "data_fingerprint": self.task.source.fingerprint(),
            "validation": None if config.validation is None else config.validation.path,
            "seed": config.train.seed,
            "device": str(self.device),
            "ranks": 1,
            "dtype": "fp32",
            "batch_size": config.train.batch_size,
            "objective": dict(config.objective.weights),
            "steps": progress.step,
            "total_steps": self.total,
            "samples_seen": progress.samples,
            "seconds": round(progress.seconds, 2),
            "skipped_steps": progress.skipped,
            "status": status,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {"clipdistill": __version__, "torch": torch.__version__, "numpy": np.__version__},
            "command": " ".join(["clipdistill", *sys.argv[1:]]) if Path(sys.argv[0]).stem == "clipdistill" else None,
        }
        temporary = config.out / ".run.json.tmp"
        temporary.write_text(json.dumps(described, indent=1), encoding="utf-8")
        temporary.replace(config.out / "run.json")


def _optimiser(teacher: MetaTeacher, objective: Objective, config: RunConfig) -> torch.optim.AdamW:
    train = config.train
    named = [(n, p) for n, p in teacher.network.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": train.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
        *objective.parameter_groups(weight_decay=train.weight_decay),
    ]
    groups = [{"lr": train.learning_rate, "initial_lr": train.learning_rate, **group} for group in groups]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, eps=train.epsilon)
