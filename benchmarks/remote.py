"""Samples per second from servers on this machine against the same tars on its disk, read in random order.

    python benchmarks/remote.py [--images 600] [--rounds 3] [--workers 0] [--latency 0] [--s3] [--json out.json]

The pairs of benchmarks/data.py (500 x 376 pixels, eight tars) are prepared for a model of 224 pixels. Contenders take
turns; what counts is the median of their ratios to the local tars of the same turn. A web server of this file (ranges
by sendfile, in a process of its own) takes its share of the same cores, and waits --latency milliseconds before it
answers. With --s3 moto's S3 server is asked too; it reads the whole object for every range, so it is measured with
copies on the disk (--local-cache): the pass that makes them and the one after it. `in order` goes through the set
as `cache` and `eval` do.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import socketserver
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import open_clip
import torch

from clipdistill.data.files import read_ahead
from clipdistill.data.loader import PairLoader
from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import PairSource
from clipdistill.data.views import OPENAI_MEAN, OPENAI_STD, ImageSpec
from clipdistill.remote import local_cache
from data import BATCH, cpu_clock, photographs, wall_clock, write

now = wall_clock


class Files(BaseHTTPRequestHandler):
    """GET with one range."""

    protocol_version = "HTTP/1.1"
    folder: Path
    latency = 0.0

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.latency)
        with (self.folder / self.path.lstrip("/")).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first, _, last = self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, size)
            self.send_response(206)
            self.send_header("ETag", f'"{size}"')
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            self.wfile.flush()
            while start < end:
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)


def serve(folder: Path, latency: float, ready: Any) -> None:
    Files.folder, Files.latency = folder, latency
    socketserver.TCPServer.request_queue_size = 64
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.daemon_threads = True
    ready.put(server.server_address[1])
    server.serve_forever()


def serve_s3(folder: Path, ready: Any) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    logging.disable()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket="pairs")
    for path in folder.iterdir():
        client.put_object(Bucket="pairs", Key=path.name, Body=path.read_bytes())
    ready.put(url)
    time.sleep(1e6)


@contextmanager
def running(target: Any, *arguments: Any) -> Iterator[Any]:
    """A server in a process of its own; gives what it says when it is ready."""
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    process = context.Process(target=target, args=(*arguments, ready), daemon=True)
    process.start()
    try:
        yield ready.get(timeout=120)
    finally:
        process.kill()


class Model:
    """What the loader asks of one."""

    image = ImageSpec(size=224, mean=OPENAI_MEAN, std=OPENAI_STD, interpolation="bicubic", resize_mode="shortest")

    def __init__(self) -> None:
        self.tokenizer = Tokens()


class Tokens:
    """CLIP's tokenizer as the loader uses one."""

    context_length = 77

    def __init__(self) -> None:
        self.own = open_clip.get_tokenizer("ViT-B-16")

    def __call__(self, texts: list[str]) -> Any:
        return self.own(texts)

    def lengths(self, texts: list[str]) -> list[int]:
        return [len(text) // 4 for text in texts]


def random_order(source: PairSource, workers: int, seed: int) -> float:
    """Samples a second through the training loader."""
    loader = PairLoader(
        source, batch_size=BATCH, student=Model(), workers=workers, steps=len(source) // BATCH, seed=seed
    )
    begun = now()
    count = sum(len(batch.keys) for batch in loader)
    return count / (now() - begun)


def in_order(source: PairSource) -> float:
    """Samples a second, decoded one after the other, in chunks as an encoder's worker has them."""
    begun = now()
    for start in range(0, len(source), 32):
        chunk = range(start, min(start + 32, len(source)))
        read_ahead(source, chunk)
        for i in chunk:
            source.image(i)
    return len(source) / (now() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=600)
    add("--rounds", type=int, default=3)
    add("--workers", type=int, default=0)
    add("--latency", type=float, default=0.0, help="milliseconds before the web server answers")
    add("--s3", action="store_true", help="moto's server too (extra dev)")
    add("--photographs", type=Path, help="a data set of real photographs to make the pictures from")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of the reader alone, for a busy machine")
    add("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.clock == "cpu":
        global now
        now = cpu_clock
    os.environ |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["CLIPDISTILL_CACHE"] = str(folder / "indexes")
        _, shards = write(folder / "files", photographs(arguments.photographs, arguments.images, 500))
        with running(serve, shards, arguments.latency / 1000) as port:
            found = raced(arguments, folder, shards, f"http://127.0.0.1:{port}")
    for line, ratios in found.items():
        print(f"{line:<42} {statistics.median(ratios):6.2f}   {min(ratios):.2f} to {max(ratios):.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def raced(arguments: argparse.Namespace, folder: Path, shards: Path, base: str) -> dict[str, list[float]]:
    """Ratios to the local tars by contender."""
    stems = sorted(path.stem for path in shards.iterdir())
    pattern = f"{{{stems[0]}..{stems[-1]}}}.tar"
    near, far = open_pairs(f"{shards}/{pattern}"), open_pairs(f"{base}/{pattern}")
    assert far.fingerprint() == near.fingerprint()
    found: dict[str, list[float]] = {}

    def note(contender: str, speed: float, local: float) -> None:
        found.setdefault(contender, []).append(speed / local)
        print(f"{contender}: {speed:.0f} a second, local {local:.0f}")

    random_order(near, arguments.workers, 0)
    for turn in range(arguments.rounds):
        local = random_order(near, arguments.workers, turn)
        note("web server, random order", random_order(far, arguments.workers, turn), local)
        with_copies(folder, turn, note, far, arguments.workers, local, "web server")
        note("web server, in order", in_order(far), in_order(near))
    if arguments.s3:
        with running(serve_s3, shards) as url:
            os.environ["AWS_ENDPOINT_URL"] = url
            there = open_pairs(f"s3://pairs/{pattern}")
            assert there.fingerprint() == near.fingerprint()
            for turn in range(arguments.rounds):
                local = random_order(near, arguments.workers, turn)
                with_copies(folder, turn, note, there, arguments.workers, local, "S3")
    return found


def with_copies(folder: Path, turn: int, note: Any, source: PairSource, workers: int, local: float, name: str) -> None:
    """The pass that makes copies, and one after it."""
    local_cache(folder / "copies")
    note(f"{name}, copies made", random_order(source, workers, turn), local)
    note(f"{name}, copies there", random_order(source, workers, turn), local)
    os.environ.pop("CLIPDISTILL_LOCAL_CACHE")
    shutil.rmtree(folder / "copies")


if __name__ == "__main__":
    main()
