"""A Ray cluster, and work spread over it by Ray Data: tasks in, tensors and notes back, in any order.

A task whose worker dies is done again by another; what a task gives depends on the task alone. The job (models, data)
goes to each machine once, tasks as JSON, results as safetensors.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from safetensors.torch import load, save
from torch import Tensor

from clipdistill import errors, registry
from clipdistill.errors import ClipdistillError, InputError, first_line, needing
from clipdistill.ray_engine.names import RayEngine
from clipdistill.runtime.machine import cpu_count
from clipdistill.version import __version__

RETRIES = 5
"""How often a task is given to another worker after its own has died."""
_STORE = 200 * 2**20
"""Bytes of shared memory for results and the job, of a cluster that is started here; Ray uses the disk beyond."""
_WAIT = 60.0
_REACH = 10.0


class Job(Protocol):
    """What the workers do; sent to them whole."""

    def start(self, device: str) -> None:
        """Called once in each worker: load what cannot be sent."""

    def __call__(self, task: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Do one task (JSON); tensors and notes (JSON)."""


@dataclass
class Cluster:
    """workers: how many; device: "cpu" or "cuda"; resources: what Ray keeps for each."""

    workers: int
    device: str
    resources: dict[str, Any]
    say: Callable[[str], None]

    def spread(self, job: Job, tasks: Sequence[Any]) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Any]]]:
        """(number of the task, tensors, notes) of each, as they are finished. Raises what a task raised."""
        if not tasks:
            return
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        try:
            held = ray.put(job)  # kept until the end: a worker that is started again asks for it
        except (TypeError, AttributeError) as error:
            raise InputError(f"engine 'ray': the model or the data cannot be sent ({first_line(error)})") from error
        rows = [{"number": number, "task": json.dumps(task)} for number, task in enumerate(tasks)]
        files = [file for file in registry._loaded if file.endswith(".py")]
        settings = {name: value for name, value in os.environ.items() if name.startswith("CLIPDISTILL_")}
        given = {
            "job": [held], "device": self.device, "folder": os.getcwd(), "plugins": files, "settings": settings,  # noqa: PTH109
            "version": __version__,
        }  # fmt: skip
        done = _mapped(
            ray.data.from_items(rows, override_num_blocks=len(rows)), fn_constructor_kwargs=given,
            compute=ray.data.ActorPoolStrategy(size=min(self.workers, len(rows)), max_tasks_in_flight_per_actor=2),
            **self.resources,
        )  # fmt: skip
        waiting = threading.Timer(
            _WAIT, self.say, [f"Ray: no task finished in {_WAIT:.0f} s: `ray status` shows what is waiting"]
        )
        waiting.daemon = True
        waiting.start()
        try:
            for row in done.iter_rows():
                waiting.cancel()
                notes = json.loads(row["notes"])
                if "error" in notes:
                    name, text = notes["error"]
                    raise getattr(errors, name, ClipdistillError)(text)
                yield int(row["number"]), load(bytes(row["tensors"])), notes
        except (ClipdistillError, GeneratorExit):
            raise
        except Exception as error:  # Ray's, of many kinds
            raise ClipdistillError(
                f"engine 'ray': {_cause(error)}: what was finished is kept; the same command goes on"
            ) from error
        finally:
            waiting.cancel()


def _mapped(rows: Any, **settings: Any) -> Any:
    """`rows.map(Worker)`, a task being tried again RETRIES times where this version of Ray lets one say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray says that it will not for long
        try:
            return rows.map(Worker, ray_remote_args_fn=lambda: {"max_task_retries": RETRIES}, **settings)
        except TypeError:
            return rows.map(Worker, **settings)


class Worker:
    """Lives in a Ray worker process; Ray Data calls it with one row at a time."""

    def __init__(
        self, job: Any, device: str, folder: str, plugins: list[str], settings: dict[str, str], version: str
    ) -> None:
        import ray
        import torch

        self.problem: ClipdistillError | None = None
        if version != __version__:
            self.problem = InputError(
                f"{socket.gethostname()}: has clipdistill {__version__} and the driver {version}: install the same one"
            )
            return
        os.environ.update(settings)
        if Path(folder).is_dir():
            os.chdir(folder)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # Ray sets it to the worker's cores
        try:
            for file in plugins:
                registry.load_plugin(file)
            self.job: Job = ray.get(job[0])
            self.job.start(device)
        except ClipdistillError as error:
            self.problem = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self.problem is not None:
                raise self.problem
            tensors, notes = self.job(json.loads(row["task"]))
        except ClipdistillError as error:
            tensors, notes = {}, {"error": [type(error).__name__, str(error)]}
        except Exception as error:
            text = f"a Ray worker on {socket.gethostname()} failed: {registry.describe(error)}"
            tensors, notes = {}, {"error": ["ClipdistillError", text]}
        return {"number": row["number"], "tensors": save(tensors), "notes": json.dumps(notes)}


def connect(engine: RayEngine, device: str | None, say: Callable[[str], None]) -> Cluster:
    """The cluster at RAY_ADDRESS, or one started here. Raises InputError where there is none or it has no room."""
    with needing("ray", "ray", "engine 'ray'"):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        import ray
        import ray.data
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is told once, in one sentence
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        local = address in ("", "local")
        own: dict[str, Any] = (
            {"address": "local", "num_cpus": cpu_count(), "object_store_memory": _STORE, "include_dashboard": False}
            if local
            else {}
        )
        if local:
            os.environ.setdefault("RAY_worker_niceness", "0")  # its own 15 starves beside any other work
        else:
            _require_reachable(address)
        for attempt in range(3):  # on a busy machine Ray gives its own processes too little time to start
            try:
                ray.init(logging_level=logging.ERROR, log_to_driver=False, configure_logging=False, **own)
                break
            except Exception as error:  # ConnectionError, RuntimeError, ValueError, ...
                if not local or attempt == 2 or "timed out" not in str(error):
                    raise _no_cluster(address, error) from error
                ray.shutdown()
    there = ray.cluster_resources()
    cpus, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
    kind = (device or ("cuda" if gpus else "cpu")).partition(":")[0]
    if kind == "cuda" and not gpus:
        raise InputError(
            f"engine 'ray': device '{device}': the Ray cluster has no GPU; leave the device out to run on its CPUs"
        )
    resources: dict[str, Any] = {"num_cpus": float(engine.cpus)}
    room = cpus // engine.cpus
    if kind == "cuda":
        each = -(-engine.workers // gpus) if engine.workers else max(1, min(4, room // gpus))
        resources["num_gpus"] = 1 / each  # several on one GPU: while one decodes, another encodes
        room = min(room, each * gpus)
    wanted = engine.workers or room
    if not 0 < wanted <= room:
        raise InputError(
            f"engine 'ray': {wanted or 1} workers of {engine.cpus} cores were asked for and the cluster has room for "
            f"{room} ({cpus} cores, {gpus} GPUs): ask for fewer, or leave workers and cpus out"
        )
    say(f"Ray: {wanted} workers on {'GPUs' if kind == 'cuda' else 'CPUs'} of {len(ray.nodes())} machines")
    return Cluster(wanted, kind, resources, say)


def _require_reachable(address: str) -> None:
    """Raise InputError at once where nobody answers: Ray itself would try for minutes."""
    if address == "auto":
        return
    advice = "start one (`ray start --head`), write its host:port, or leave RAY_ADDRESS out to start one here"
    try:
        place = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = place.hostname, place.port or 10001
    except ValueError:
        host = port = None
    if not host or not port:
        raise InputError(f"engine 'ray': RAY_ADDRESS={address} is no host:port: {advice}")
    try:
        socket.create_connection((host, port), _REACH).close()
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InputError(f"engine 'ray': no Ray cluster at RAY_ADDRESS={address} ({reason}): {advice}") from error


def _no_cluster(address: str, error: BaseException) -> InputError:
    if address in ("", "local"):
        return InputError(f"engine 'ray': no Ray cluster can be started on this machine: {first_line(error)}")
    inner, text = error.__cause__, first_line(error)
    if "InvalidAuthToken" in f"{error} {inner}":
        text = "it asks for a token: set RAY_AUTH_MODE=token, with the cluster's ~/.ray/auth_token on this machine"
    return InputError(f"engine 'ray': the cluster at RAY_ADDRESS={address} cannot be used: {text}")


def _cause(error: BaseException) -> str:
    """What Ray could not do, in a few words."""
    if "No module named 'clipdistill" in str(error):
        return f"clipdistill is not installed for the workers' Python: install version {__version__} on each machine"
    return f"{type(error).__name__}: {first_line(error)}"
