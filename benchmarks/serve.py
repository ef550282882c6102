"""The service on the loopback: its throughput beside plain batched calls of the same export in turns, and bad requests.

    python benchmarks/serve.py EXPORT [--rounds 3] [--seconds 8] [--cores 2] [--bad-requests 10000]
                               [--out docs/performance/serve]

The service is a process of its own (`clipdistill serve`, one thread for the towers, batches of 32), its callers another
one with keep-alive connections. Plain: this process decodes, prepares and encodes the same pictures in batches of 32 in
one thread; tower: the same batches, prepared already (what `clipdistill bench` measures). They take turns of
`--seconds`; ratios are medians over the rounds. Plain calls and the tower alone have one processor. The service has the
same one and its callers another (1), where decoding, HTTP and the tower share what the tower has alone; or service and
callers share two (2), where they run beside the tower's one thread. Processor time of the service for each picture
beside that of plain calls is a further ratio, which other work on the machine moves less. A line a round goes to
stderr.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BATCH = 32
CALLERS = {1: 48, 8: 8}
"""Pictures of a request -> connections: some two batches are on their way."""
PICTURES = 64
ATTACKERS = 64
"""One in forty bad requests waits for the service's patience (10 s for headers) to end: they wait beside each other."""
BEGAN = time.perf_counter()


def tell(text: str) -> None:
    """A line of progress."""
    print(f"{time.perf_counter() - BEGAN:7.1f} s  {text}", file=sys.stderr, flush=True)


def photographs(count: int, side: tuple[int, int] = (500, 375)) -> list[bytes]:
    """Seeded JPEGs, smooth with some grain, of the size of Flickr8k's."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(side, Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (side[1], side[0], 3))
        data = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(small) + grain, 0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
        found.append(data.getvalue())
    return found


def processor_seconds(process: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(process: int) -> int:
    """Resident memory in MiB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


@contextlib.contextmanager
def service(export: str) -> Iterator[tuple[int, int]]:
    """`clipdistill serve EXPORT` in a process: (its id, its port)."""
    command = [sys.executable, "-m", "clipdistill", "serve", export, "--port", "0", "--threads", "1"]
    command += ["--batch-size", str(BATCH)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    try:
        port = next(int(found[1]) for line in process.stdout if (found := re.search(r"http://[^ ]*:(\d+)/", line)))
        yield process.pid, port
    finally:
        process.terminate()
        process.wait(60)


def put(process: int, cores: set[int]) -> None:
    """All threads of a process onto these processors."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def call(port: int, pictures: int, connections: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Ask for that long with the JPEGs of a folder; latencies in seconds and pictures answered. In its own process."""
    bodies = []
    photos = [path.read_bytes() for path in sorted(folder.iterdir())]
    for start in range(0, len(photos), pictures):
        images = [base64.b64encode(data).decode() for data in photos[start : start + pictures]]
        bodies.append(json.dumps({"images": images, "format": "base64"}).encode())
    kind = {"Content-Type": "application/json"}
    latencies: list[float] = []
    refused: list[int] = []
    begin = time.perf_counter() + 0.3
    end = begin + seconds

    def ask(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        time.sleep(max(0.0, begin - time.perf_counter()))
        while (start := time.perf_counter()) < end:
            connection.request("POST", "/embed/images", bodies[number % len(bodies)], kind)
            answer = connection.getresponse()
            answer.read()
            if answer.status == 200:
                latencies.append(time.perf_counter() - start)
            else:
                refused.append(answer.status)
            number += connections

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begin
    return {"latencies": latencies, "pictures": pictures * len(latencies), "seconds": took, "refused": len(refused)}


def measure(export: str, rounds: int, seconds: float, places: list[int]) -> dict[str, Any]:
    """The alternating run, for each number of processors that the service has."""
    import torch

    from clipdistill.serve.command import served_name
    from clipdistill.serve.model import ServedModel

    here, *others = sorted(os.sched_getaffinity(0))
    there = others[0] if others else here
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {here})
    model = ServedModel(served_name(export), "cpu")
    tell("model loaded")
    photos = photographs(PICTURES)

    def prepare(start: int) -> np.ndarray:
        return np.stack([model.pixels(photos[(start + i) % PICTURES], 10**8) for i in range(BATCH)])

    ready = prepare(0)
    for _ in range(3):
        model.images(ready)

    def plain(tower: bool) -> tuple[float, float, float]:
        """(pictures a second, processor seconds a picture, median seconds of a batch)."""
        times, used, begin = [], time.process_time(), time.perf_counter()
        while time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            model.images(ready if tower else prepare(BATCH * len(times)))
            times.append(time.perf_counter() - start)
        done = BATCH * len(times)
        return done / (time.perf_counter() - begin), (time.process_time() - used) / done, statistics.median(times)

    found: dict[str, dict[str, list[dict[str, float]]]] = {
        str(cores): {str(pictures): [] for pictures in CALLERS} for cores in places
    }
    with tempfile.TemporaryDirectory() as folder, service(export) as (process, port):
        tell("service started")
        for number, photo in enumerate(photos):
            (Path(folder) / f"{number:03}.jpg").write_bytes(photo)
        for number, cores, (pictures, connections) in itertools.product(range(rounds + 1), places, CALLERS.items()):
            put(process, {here} if cores == 1 else {here, there})
            whole, alone = plain(False), plain(True)
            used = processor_seconds(process)
            order = f"{port},{pictures},{connections},{seconds},{folder}"
            command = ["taskset", "-c", f"{there}" if cores == 1 else f"{here},{there}"]
            command += [sys.executable, __file__, export, "--call", order]
            asked = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            used = processor_seconds(process) - used
            rate = asked["pictures"] / asked["seconds"]
            tell(
                f"round {number} of {rounds}, {pictures} a request, cores {cores}: service {rate:.1f} pictures/s, "
                f"plain {whole[0]:.1f}, tower {alone[0]:.1f}"
            )
            if number == 0:
                continue  # the first round warms up
            late = sorted(asked["latencies"])
            found[str(cores)][str(pictures)].append({
                "service": rate, "plain": whole[0], "tower": alone[0], "to plain": rate / whole[0],
                "to tower": rate / alone[0], "processor to plain": whole[1] * asked["pictures"] / used,
                "processor to tower": alone[1] * asked["pictures"] / used, "batch": whole[2],
                "p50 in batches": late[len(late) // 2] / whole[2],
                "p99 in batches": late[int(0.99 * len(late))] / whole[2],
                "refused": asked["refused"],
            })  # fmt: skip
    return {
        cores: {
            pictures: {key: statistics.median(round_[key] for round_ in rows) for key in rows[0]}
            for pictures, rows in cases.items()
        }
        for cores, cases in found.items()
    }


def attacked(export: str, count: int, seed: int) -> dict[str, Any]:
    """Bad requests in ten parts, with memory, open files and threads after each."""
    from tests.serve.bad_requests import GOOD, attack

    with service(export) as (process, port):

        def state() -> dict[str, int]:
            place = Path(f"/proc/{process}")
            return {
                "MiB": resident(process),
                "files": len(list((place / "fd").iterdir())),
                "threads": len(list((place / "task").iterdir())),
            }

        tell("service started")
        attack("127.0.0.1", port, 100, seed + 1000, threads=ATTACKERS)
        states, faults, statuses, begin = [state()], [], {}, time.perf_counter()
        for part in range(10):
            found = attack("127.0.0.1", port, count // 10, seed * 10 + part, threads=ATTACKERS)
            faults += found.faults
            for kind, answers in found.answers.items():
                for status, number in answers.items():
                    key = ("good" if kind == GOOD else "bad", status)
                    statuses[key] = statuses.get(key, 0) + number
            states.append(state())
            tell(f"{(part + 1) * (count // 10)} bad requests, {len(faults)} faults, {states[-1]}")
        took = time.perf_counter() - begin
        alive = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        alive.request("GET", "/health")
        healthy = alive.getresponse().status == 200
    return {
        "requests": count // 10 * 10,
        "seed": seed,
        "faults": faults,
        "seconds": took,
        "statuses": {f"{kind} {status}": number for (kind, status), number in sorted(statuses.items())},
        "states": states,
        "healthy": healthy,
    }


def page(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["# The service", ""]
    if speed := result.get("speed"):
        heads = "processors of the service | pictures a request, connections | pictures/s | of plain calls' | of the "
        heads += "tower's alone | processor time, plain / service | tower / service | median latency, in batches | p99 "
        heads += "| load of the machine"
        lines += [
            f"`python benchmarks/serve.py {result['name']}`: {result['device']}, one thread, batches of {BATCH}, "
            "JPEGs of 500 x 375.",
            "Medians of an alternating run; processor time is that of the whole service for each picture. Plain calls "
            "and the tower alone have one processor. With 1 the service has the same one; with 2 it and its callers "
            "share both.",
            "",
            f"| {heads} |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for cores, cases in sorted(speed.items()):
            for pictures, row in cases.items():
                names = ("to plain", "to tower", "processor to plain", "processor to tower")
                cells = [cores, f"{pictures}, {CALLERS[int(pictures)]}", f"{row['service']:.1f}"]
                cells += [f"{row[name]:.2f}" for name in names]
                cells += [f"{row[name]:.1f}" for name in ("p50 in batches", "p99 in batches")]
                cells.append(" to ".join(f"{load:.1f}" for load in result["load"][cores]))
                lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "A batch: decoding, preparing and encoding 32 pictures by plain calls.", ""]
    if bad := result.get("attack"):
        states = bad["states"]
        lines += [
            f"{bad['requests']:,} bad requests (seed {bad['seed']}; one in twelve is a good one): {len(bad['faults'])} "
            f"faults, and it {'answered' if bad['healthy'] else 'did not answer'} afterwards. Resident memory before "
            f"and after each tenth: {', '.join(str(state['MiB']) for state in states)} MiB; open files "
            f"{states[0]['files']} and {states[-1]['files']}, threads {states[0]['threads']} and "
            f"{states[-1]['threads']}.",
            "",
            "| " + " | ".join(bad["statuses"]) + " |",
            "|" + "---|" * len(bad["statuses"]),
            "| " + " | ".join(f"{number:,}" for number in bad["statuses"].values()) + " |",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("export")
    parser.add_argument("--rounds", type=int, default=3, help="0: no speed")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--cores", type=int, choices=(1, 2), action="append", help="of the service (default: both)")
    parser.add_argument("--bad-requests", type=int, default=10_000, help="0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="FILE.md and FILE.json; what an earlier run wrote there of the other half stays"
    )
    parser.add_argument("--call", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.call:
        port, pictures, connections, seconds, folder = given.call.split(",", 4)
        print(json.dumps(call(int(port), int(pictures), int(connections), float(seconds), Path(folder))))
        return
    import torch

    from clipdistill.bench.device import describe_device
    from clipdistill.runtime.files import read_json, write_json, write_text

    result: dict[str, Any] = {}
    kept = given.out.with_suffix(".json") if given.out else None
    if kept is not None and kept.is_file():
        result |= read_json(kept)
    loads = [os.getloadavg()[0]]
    torch.set_num_threads(1)
    result["device"] = describe_device(torch.device("cpu"))["label"]
    if given.rounds:
        result["name"] = Path(given.export).name
        speed = measure(given.export, given.rounds, given.seconds, given.cores or [1, 2])
        result["speed"] = result.get("speed", {}) | speed
        loads.append(os.getloadavg()[0])
        result["load"] = result.get("load", {}) | {cores: [min(loads), max(loads)] for cores in speed}
    if given.bad_requests:
        result["attack"] = attacked(given.export, given.bad_requests, given.seed)
    print(page(result))
    print("\n".join(result.get("attack", {}).get("faults", [])[:20]))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(given.out.with_suffix(".json"), result)
        write_text(given.out.with_suffix(".md"), page(result))


if __name__ == "__main__":
    main()
