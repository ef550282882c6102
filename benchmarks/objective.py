"""Time and memory of the CLIP-RD objective, forward and backward: released form, dense engine, tiled engine.

    python benchmarks/objective.py                 # everything that fits: N = 256 ... 65,536, D = 512 and 768
    python benchmarks/objective.py --quick         # N = 256 and 1024, D = 512, under two minutes
    python benchmarks/objective.py --sizes 8192 --dims 512 --forms released,tiled,tiled-bfloat16
    python benchmarks/objective.py --device cuda

Every measurement is a process of its own, so that its peak memory is its own; forms take turns, so that a change in
the machine's speed meets all. Each process also measures the rate of plain matrix products in tiles, just before
and after, which gives the floor: 18 N^2 D multiply-adds (6 products to sum exponentials, 6 to recompute, 6 for the
gradients) at that rate. Writes objective.json, objective.md and objective.svg to --out.

"Released" is the CLIP-RD loss as its authors' code computes it, written out here from the published formulas: whole
matrices, one softmax, log-softmax, cross-entropy or KL call per direction, gradients by autograd.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = (256, 1024, 4096, 8192, 16384, 32768, 65536)
DIMS = (512, 768)
FORMS = ("released", "dense", "tiled", "tiled-bfloat16")
WEIGHTS = {"task": 1.0, "crd": 1.0, "icl": 1.0, "fd": 2000.0, "vrd_kl": 1.0, "vrd_ce": 1.0, "xrd": 1.0}
# N x N float32 matrices alive at the peak, measured: decides whether a form is tried at all
MATRICES = {"released": 35, "dense": 35}
TILE = (512, 1024)
# on a machine that others use too, the processor time of one thread is the steadier measure (--clock cpu --threads 1)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def released_form(a: Tensor, b: Tensor, u: Tensor, v: Tensor, scales: dict[str, Tensor]) -> Tensor:
    """The CLIP-RD loss on whole matrices. a, b: raw student rows; u, v: normalised teacher rows, (N, D)."""

    def contrast(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def divergence(target: Tensor, logits: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(logits, dim=1), F.softmax(target.detach(), dim=1), reduction="batchmean")

    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    labels = torch.arange(len(a), device=a.device)
    student, teacher = scales["student"] * a @ b.T, scales["teacher"] * u @ v.T
    image, text = scales["image"] * u @ a.T, scales["text"] * v @ b.T
    image_text, text_image = scales["cross"] * u @ b.T, scales["cross"] * v @ a.T
    task = (contrast(student) + contrast(student.T)) / 2
    crd = (divergence(teacher, student) + divergence(teacher.T, student.T)) / 2
    icl = (contrast(text_image.T) + contrast(image_text.T)) / 2
    fd = F.mse_loss(a, u) + F.mse_loss(b, v)
    vrd = (divergence(text, image) + divergence(text.T, image.T)) / 2
    vrd = vrd + (contrast(image) + contrast(image.T) + contrast(text) + contrast(text.T)) / 2
    xrd = (
        divergence(text_image, image_text)
        + divergence(image_text, text_image)
        + divergence(text_image.T, image_text.T)
        + divergence(image_text.T, text_image.T)
    ) / 4
    return task + crd + icl + 2000 * fd + vrd + xrd


class Case:
    """Inputs of one measurement and the step to be timed; the student is near the teacher, as late in training."""

    def __init__(self, form: str, n: int, dim: int, device: str) -> None:
        generator = torch.Generator().manual_seed(n + dim)

        def rows(near: Tensor | None = None) -> Tensor:
            made = torch.randn(n, dim, generator=generator)
            return F.normalize(made if near is None else near + 0.05 * made, dim=1).to(device)

        self.n, self.dim, self.device, self.form = n, dim, torch.device(device), form
        self.u = rows()
        self.v = rows(0.5 * self.u.cpu())
        self.a = (7 * rows(self.u.cpu())).requires_grad_()
        self.b = (7 * rows(self.v.cpu())).requires_grad_()
        self.scales = {"student": torch.tensor(14.285714, device=device, requires_grad=True)}
        self.scales["teacher"] = torch.tensor(100.0, device=device)
        if form == "released":
            names = ("image", "text", "cross")
            self.scales |= {k: torch.tensor(2.65926, device=device, requires_grad=True) for k in names}
            self.parameters = [self.scales[name] for name in names]
        else:
            from clipdistill.objective import Objective

            engine, _, products = form.partition("-")
            self.objective = Objective(
                WEIGHTS, student_dim=dim, teacher_dim=dim, engine=engine, products=products or "exact"
            ).to(device)
            self.parameters = list(self.objective.parameters())

    def step(self) -> Tensor:
        """One forward and backward pass; the gradients stay in the inputs."""
        for leaf in self.leaves():
            leaf.grad = None
        if self.form == "released":
            total = released_form(self.a, self.b, self.u, self.v, self.scales)
        else:
            from clipdistill.objective import Embeddings

            student = Embeddings(self.a, self.b, self.scales["student"])
            total = self.objective(student, Embeddings(self.u, self.v, self.scales["teacher"])).total
        total.backward()
        self.synchronise()
        return total.detach()

    def leaves(self) -> list[Tensor]:
        """What receives a gradient: image rows, text rows, the student's scale, k_i, k_t, k_c."""
        return [self.a, self.b, self.scales["student"], *self.parameters]

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def product_rate(case: Case, clock: Callable[[], float], seconds: float = 0.4) -> float:
    """Multiply-adds a second of the products the tiled engine makes, in exact precision, nothing else in between."""
    rows, columns = TILE if case.device.type == "cpu" else (2048, 8192)
    a, b = (torch.randn(count, case.dim, device=case.device) for count in (rows, columns))
    g = torch.randn(rows, columns, device=case.device)
    into = [torch.zeros(rows, columns, device=case.device), torch.zeros_like(a), torch.zeros_like(b)]

    def three() -> None:
        into[0].addmm_(a, b.T, beta=0)
        into[1].addmm_(g, b)
        into[2].addmm_(g.T, a)
        case.synchronise()

    three()
    done, start = 0, clock()
    while clock() - start < seconds:
        three()
        done += 3
    return done * rows * columns * case.dim / (clock() - start)


def resident() -> tuple[int, int]:
    """Bytes of memory this process has now, and the most it had since `forget_peak`."""
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(("VmRSS:", "VmHWM:")):
            found[line[:5]] = int(line.split()[1]) * 1024
    return found["VmRSS"], found["VmHWM"]


def forget_peak() -> None:
    """Start the record of peak memory anew, where the kernel lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        print("the peak memory of this kernel cannot be reset; figures include the inputs' peak", file=sys.stderr)


def child(settings: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    clock = CLOCKS[settings["clock"]]
    case = Case(settings["form"], settings["n"], settings["dim"], settings["device"])
    small = Case(settings["form"], 64, settings["dim"], settings["device"])
    small.step()  # libraries load what they need before memory is looked at
    rates = [product_rate(case, clock)]
    cuda = case.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        forget_peak()
        before, _ = resident()
    times: list[float] = []
    total = float("nan")
    # the first step also finds the memory; it counts only where a second one would take too long
    while not times or (len(times) < 200 and sum(times) < settings["seconds"]):
        start = clock()
        total = float(case.step())
        times.append(clock() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else resident()[1]
    rates.append(product_rate(case, clock))
    timed = times[1:] or times
    return {
        **settings,
        "total": total,
        "seconds_best": min(timed),
        "seconds_median": statistics.median(timed),
        "steps": len(timed),
        "extra_bytes": peak - before,
        "process_bytes": peak if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rate_before": rates[0],
        "rate_after": rates[1],
    }


def check(dim: int, device: str) -> dict[str, float]:
    """Every form against the released one at N = 512: largest relative deviation of a gradient.

    An exact form that deviates by more than rounding stops the benchmark on a CPU; on another device it is told.
    """
    cases = {form: Case(form, 512, dim, device) for form in FORMS}
    totals = {form: float(case.step()) for form, case in cases.items()}
    worst = {}
    for form, case in cases.items():
        pairs = zip(cases["released"].leaves(), case.leaves())
        errors = [float((ours.grad - theirs.grad).norm() / theirs.grad.norm()) for theirs, ours in pairs]
        worst[form] = max(errors)
        loss = abs(totals[form] - totals["released"]) / abs(totals["released"])
        if form != "tiled-bfloat16" and (loss > 1e-6 or worst[form] > 1e-4):
            told = f"{form} differs from the released form: loss {loss:.1e}, gradients {errors}"
            if device == "cpu":
                raise SystemExit(told)
            print(told, file=sys.stderr)
    return worst


def available_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 * 2**30


def measure(arguments: argparse.Namespace, report: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """All measurements, forms taking turns; `report` is called after every size, so an interruption loses little."""
    results: list[dict[str, Any]] = []
    for dim in arguments.dims:
        for n in arguments.sizes:
            rounds = arguments.rounds if n <= 8192 else 1
            for _ in range(rounds):
                for form in arguments.forms:
                    need = MATRICES.get(form, 0) * n * n * 4
                    if need > 0.8 * available_bytes(arguments.device) or n > arguments.largest.get(form, n):
                        continue
                    settings = {
                        "form": form,
                        "n": n,
                        "dim": dim,
                        "device": arguments.device,
                        "threads": arguments.threads,
                        "clock": arguments.clock,
                        "seconds": arguments.seconds if n <= 4096 else 0.0,
                    }
                    command = [sys.executable, __file__, "--child", json.dumps(settings)]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    if done.returncode != 0:
                        print(f"{form} N={n} D={dim} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                        continue
                    results.append(json.loads(done.stdout.splitlines()[-1]))
                    last = results[-1]
                    print(
                        f"D={dim} N={n:6d} {form:15s} {last['seconds_best']:9.4f} s  "
                        f"{last['extra_bytes'] / 2**20:9.1f} MiB  products at {last['rate_after'] / 1e9:.0f} G/s",
                        flush=True,
                    )
            report(results)
    return results


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per D, N and form: the best time, the most memory, the floor at the best rate any process of that D and N saw."""
    rows = []
    for key in dict.fromkeys((r["dim"], r["n"]) for r in results):
        group = [r for r in results if (r["dim"], r["n"]) == key]
        rate = max(max(r["rate_before"], r["rate_after"]) for r in group)
        floor = 18 * key[1] ** 2 * key[0] / rate
        row: dict[str, Any] = {"dim": key[0], "n": key[1], "floor_seconds": floor, "rate": rate, "forms": {}}
        for form in dict.fromkeys(r["form"] for r in group):
            own = [r for r in group if r["form"] == form]
            row["forms"][form] = {
                "seconds": min(r["seconds_best"] for r in own),
                "slowest_seconds": max(r["seconds_median"] for r in own),
                "extra_bytes": max(r["extra_bytes"] for r in own),
                "process_bytes": max(r["process_bytes"] for r in own),
                "total": own[0]["total"],
            }
        rows.append(row)
    return rows


def machine(device: str, threads: int, clock: str) -> dict[str, Any]:
    """What was measured on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
        flags = next((line for line in lines if line.startswith("flags")), "").split()
        units = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags]
        name = f"{name} ({', '.join(units)})"
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    return {
        "device": name,
        "threads": threads or torch.get_num_threads(),
        "clock": clock,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def size_of(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def seconds_of(value: float) -> str:
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def markdown(rows: list[dict[str, Any]], about: dict[str, Any], errors: dict[str, float]) -> str:
    """The table of docs/performance/objective.md."""
    lines = [
        "# The objective: time and memory",
        "",
        "<!-- written by benchmarks/objective.py; do not edit -->",
        "",
        f"CLIP-RD mix ({', '.join(WEIGHTS)}), forward and backward, float32 features. {about['device']}, "
        f"{about['threads']} threads, {about['clock']} time, {size_of(about['memory_bytes'])}, torch {about['torch']}, "
        f"{about['date']}.",
        "",
        "Time: best step. Memory: what a step adds to a process that already holds the embeddings. Floor: 18 N² D",
        "multiply-adds at the rate of plain products in the same processes. `x` columns: against the released form.",
        "",
        "| D | N | form | time | x faster | extra memory | x less | time / floor | whole process |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = row["forms"].get("released")
        for form, found in row["forms"].items():
            faster = f"{base['seconds'] / found['seconds']:.1f}" if base else ""
            less = f"{base['extra_bytes'] / max(found['extra_bytes'], 1):.0f}" if base and row["n"] >= 1024 else ""
            lines.append(
                f"| {row['dim']} | {row['n']:,} | {form} | {seconds_of(found['seconds'])} | {faster} | "
                f"{size_of(found['extra_bytes'])} | {less} | {found['seconds'] / row['floor_seconds']:.2f} | "
                f"{size_of(found['process_bytes'])} |"
            )
    lines += [
        "",
        "Rate of matrix products (multiply-adds per second, float32): "
        + ", ".join(f"N={r['n']:,} D={r['dim']}: {r['rate'] / 1e9:.0f} G" for r in rows)
        + ".",
        "",
        "Gradients against the released form at N = 512 (largest relative deviation, norm of a gradient): "
        + ", ".join(f"{form} {value:.0e}" for form, value in errors.items() if form != "released")
        + ".",
        "",
        "The tiled engine keeps up to 256 MiB of logits between its passes on a CPU (a constant), so it makes between",
        "12 and 18 N² D multiply-adds; small batches can beat the floor. `tiled-bfloat16` rounds factors only where",
        "the processor has bfloat16 matrix units (`amx_bf16`, or a GPU); elsewhere it is the exact form, with products",
        "by oneDNN instead of MKL.",
        "",
        "![Time and memory against batch size](objective.svg)",
        "",
    ]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and extra memory against N for the smallest D measured."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path.name} is not drawn: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    dim = min(row["dim"] for row in rows)
    rows = [row for row in rows if row["dim"] == dim]
    colours = {"released": "#b0413e", "dense": "#d99a2b", "tiled": "#2a6f97", "tiled-bfloat16": "#61a5c2"}
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(10, 4))
    for form, colour in colours.items():
        found = [(row["n"], row["forms"][form]) for row in rows if form in row["forms"]]
        if found:
            sizes = [n for n, _ in found]
            times.plot(sizes, [f["seconds"] for _, f in found], "o-", color=colour, label=form)
            memory.plot(sizes, [max(f["extra_bytes"], 1) / 2**30 for _, f in found], "o-", color=colour, label=form)
    times.plot([r["n"] for r in rows], [r["floor_seconds"] for r in rows], ":", color="grey", label="floor")
    for axes, title in ((times, "seconds per step"), (memory, "extra memory, GiB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(f"batch size N (D = {dim})")
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the CLIP-RD objective.")
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--sizes", type=numbers, default=list(SIZES), help="batch sizes N, comma-separated")
    parser.add_argument("--dims", type=numbers, default=list(DIMS), help="embedding sizes D, comma-separated")
    parser.add_argument("--forms", type=lambda text: text.split(","), default=list(FORMS))
    limit = lambda text: (text.partition("=")[0], int(text.partition("=")[2]))  # noqa: E731
    parser.add_argument(
        "--largest", type=limit, action="append", default=[], metavar="FORM=N", help="largest N of a form; repeatable"
    )
    parser.add_argument("--rounds", type=int, default=2, help="turns of each form, up to N = 8192")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent per measurement, up to N = 4096")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: processor time, with --threads 1")
    parser.add_argument("--quick", action="store_true", help="N = 256 and 1024, D = 512")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "performance")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    arguments.largest = dict(arguments.largest)
    unknown = (set(arguments.forms) | set(arguments.largest)) - set(FORMS)
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("--clock cpu adds up the time of all threads: use it with --threads 1")
    if unknown:
        parser.error(f"unknown form {', '.join(sorted(unknown))}; known: {', '.join(FORMS)}")
    if arguments.quick:
        arguments.sizes, arguments.dims = [256, 1024], [512]
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = machine(arguments.device, arguments.threads, arguments.clock)
    errors = check(arguments.dims[0], arguments.device)

    def report(results: list[dict[str, Any]]) -> None:
        rows = summarise(results)
        document = {"about": about, "gradient_errors": errors, "rows": rows, "measurements": results}
        (arguments.out / "objective.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (arguments.out / "objective.md").write_text(markdown(rows, about, errors), encoding="utf-8")
        plot(rows, arguments.out / "objective.svg")

    measure(arguments, report)
    print((arguments.out / "objective.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
