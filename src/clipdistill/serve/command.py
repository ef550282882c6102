"""`clipdistill serve`: a model as a small HTTP service."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from clipdistill.errors import InputError, needing
from clipdistill.models.names import check_model_name
from clipdistill.runtime.console import say
from clipdistill.serve.limits import BODY_SECONDS, CONNECTIONS, LONGEST_HEADERS, ServiceLimits

if TYPE_CHECKING:
    import torch

    from clipdistill.serve.app import Service
    from clipdistill.serve.connection import StoppableServer

PORT, HOST = 8000, "127.0.0.1"
_USAGE = """
clipdistill export runs/x --to onnx --out export/x && clipdistill serve export/x
curl -F images=@photo.jpg http://127.0.0.1:8000/embed/images
curl -F images=@photo.jpg -F labels="a dog" -F labels="a cat" http://127.0.0.1:8000/classify

It answers on this machine only unless --host says otherwise, without passwords or encryption: put a proxy before it.
"""
_HELP = {
    "batch_size": "pictures, or texts, that go through a tower together at most",
    "wait_ms": "milliseconds that the first of a batch waits for more",
    "queue": "pictures that may be on their way; more are told to come again (429)",
    "timeout": "seconds from a request's last byte to its answer",
    "pictures": "of one request at most",
    "texts": "of one request at most",
    "megabytes": "MiB of one request at most",
    "pixels": "of one picture at most",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, where to listen, and the limits."""
    parser.epilog = _USAGE
    add = parser.add_argument
    add("model", metavar="EXPORT", help="the folder of an export (--to onnx, --to openvino), or any name of a model")
    add("--port", type=int, default=PORT, help=f"0 takes a free one (default: {PORT})")
    add("--host", default=HOST, help="address to listen on (default: this machine only)")
    add("--allow-host", action="append", default=[], metavar="NAME", help="a further name that requests may call it by")
    for setting in fields(ServiceLimits):
        kind = float if isinstance(setting.default, float) else int
        option = f"--{setting.name.replace('_', '-')}"
        add(option, type=kind, default=setting.default, help=f"{_HELP[setting.name]} (default: {setting.default})")
    add("--threads", type=int, help="of the towers (default: as many as the machine has cores)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU when there is one)")


def run(arguments: argparse.Namespace) -> int:
    """Load the model and answer until SIGINT or SIGTERM; what was accepted by then is answered."""
    from clipdistill.runtime.signals import StopSignal

    limits = ServiceLimits(**{setting.name: getattr(arguments, setting.name) for setting in fields(ServiceLimits)})
    if not 0 <= arguments.port <= 65535:
        raise InputError(f"--port must be between 0 and 65535, got {arguments.port}")
    if arguments.threads is not None and not 1 <= arguments.threads <= 1024:
        raise InputError(f"--threads must be from 1 to 1024, got {arguments.threads}")
    check_hosts(arguments.allow_host, "--allow-host")
    name = served_name(arguments.model)
    check_model_name(name)
    require_packages()
    with listening(arguments.host, arguments.port) as place, StopSignal() as stop:
        service, server = make_service(
            name, limits, place, names=arguments.allow_host, threads=arguments.threads, device=arguments.device
        )
        server.stop = stop
        place.listen(CONNECTIONS)  # from the moment its address is told
        host, port = place.getsockname()[:2]
        size, width = service.model.model.image.size, service.model.width
        say(f"serving {name}: pictures of {size} pixels and texts as {width} numbers")
        say(f"http://{f'[{host}]' if ':' in host else host}:{port}/   (Ctrl-C ends it; /metrics counts)")
        if service.hosts is None:
            say("note: it listens beyond this machine, for everyone who can reach it", sys.stderr)
        server.run(sockets=[place])
        service.close()
        say("stopped; what had been accepted is answered")
    return 0


def served_name(name: str) -> str:
    """The name of the model: the folder of an export is named with the runtime that its graphs are for."""
    from pathlib import Path

    folder = Path(name).expanduser()
    if folder.suffix in (".onnx", ".xml") and folder.is_file():
        raise InputError(f"{name}: is one tower of an export: name its folder, {folder.parent}")
    for runtime, graph in (("onnx", "image.onnx"), ("openvino", "image.xml")):
        if (folder / graph).is_file():
            return f"{runtime}:{name}"
    return name


def check_hosts(names: Sequence[str], what: str) -> None:
    """Raise InputError for what no Host header can name once its port is taken off."""
    for name in names:
        if not re.fullmatch(r"[\w.-]+|[0-9A-Fa-f:.]+", name):
            raise InputError(f"{what} '{name}': a name or an address alone, without http://, port or path (photos.lan)")


def require_packages() -> None:
    """Raise MissingExtraError where one of the packages of a service is missing."""
    for package, module in (
        ("starlette", "starlette"),
        ("uvicorn", "uvicorn"),
        ("python-multipart", "python_multipart"),
        ("prometheus-client", "prometheus_client"),
    ):
        with needing(package, "serve", "clipdistill serve"):
            __import__(module)


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there. Raises InputError where that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((host, port))
        except (OSError, UnicodeError) as error:
            raise InputError(
                f"the service cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error}): "
                "choose another --port (0 takes a free one) or --host"
            ) from error
        yield place


def make_service(
    name: str,
    limits: ServiceLimits,
    place: socket.socket,
    *,
    names: Sequence[str] = (),
    threads: int | None = None,
    device: str | torch.device | None = None,
) -> tuple[Service, StoppableServer]:
    """The application for the model called `name`, warmed up, and the server that will answer at `place`."""
    import torch
    import uvicorn

    from clipdistill.serve.app import Service
    from clipdistill.serve.connection import BoundedConnection, StoppableServer
    from clipdistill.serve.model import ServedModel

    if threads is not None:
        torch.set_num_threads(threads)
    model = ServedModel(name, device)
    model.warm_up(limits.batch_size)
    host = place.getsockname()[0]
    local = ipaddress.ip_address(host).is_loopback
    service = Service(model, limits, {host, *map(str.lower, names)} if local or names else None)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a line for every form that is none
    settings = uvicorn.Config(
        service,
        http=BoundedConnection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        backlog=CONNECTIONS,
        h11_max_incomplete_event_size=LONGEST_HEADERS,
        timeout_graceful_shutdown=round(limits.timeout + BODY_SECONDS),
    )
    return service, StoppableServer(settings)


@contextlib.contextmanager
def in_thread(
    name: str,
    limits: ServiceLimits | None = None,
    *,
    host: str = HOST,
    port: int = 0,
    names: Sequence[str] = (),
    threads: int | None = None,
    device: str | torch.device | None = "cpu",
) -> Iterator[tuple[Service, str, int]]:
    """A service while the block runs, on a free port of this machine: (service, host, port)."""
    require_packages()
    import torch

    with listening(host, port) as place, contextlib.ExitStack() as held:
        if threads is not None:
            held.callback(torch.set_num_threads, torch.get_num_threads())
        service, server = make_service(
            name, limits or ServiceLimits(), place, names=names, threads=threads, device=device
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield service, *place.getsockname()[:2]
        finally:
            server.should_exit = True
            thread.join()
            service.close()
