"""W ranks give the value and gradients of one process with the whole batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from clipdistill.objective import Embeddings
from tests.objective.mixes import EVERYTHING, gradients, leaves, make_input, make_objective, mix_names

STUDENT, TEACHER = 5, 8
ENGINES = ("dense", "tiled")
WATCHED = 192
Case = tuple[str, str, tuple[int, ...]]  # mix, engine, rows per rank
# rows per rank: even, uneven, and a rank with nothing
SPLITS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((9,),),
    2: ((4, 4), (6, 3), (7, 0)),
    4: ((3, 3, 3, 3), (4, 0, 2, 1)),
}


def part(embeddings: Embeddings, start: int, stop: int) -> Embeddings:
    """Rows start..stop as leaves of their own."""
    rows: dict[str, Any] = {}
    for name in ("image", "text", "synthetic_text"):
        matrix = getattr(embeddings, name)
        if matrix is not None:
            rows[name] = matrix.detach()[start:stop].clone().requires_grad_(matrix.requires_grad)
    for name in ("logit_scale", "logit_bias"):
        value = getattr(embeddings, name)
        if isinstance(value, torch.Tensor):
            rows[name] = value.detach().clone().requires_grad_(value.requires_grad)
    if embeddings.bank is not None:
        rows["bank"] = replace(embeddings.bank, place=embeddings.bank.place[start:stop])
    return replace(embeddings, **rows)


class Watch(TorchDispatchMode):
    """The largest matrix alive in a step, and the number of collectives by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.collectives[func.overloadpacket.__name__] += 1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def worker(rank: int, size: int, folder: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    results = []
    for mix, engine, counts in cases:
        student, teacher = make_input(mix, sum(counts), STUDENT, TEACHER)
        start = sum(counts[:rank])
        own, theirs = (part(given, start, start + counts[rank]) for given in (student, teacher))
        objective = make_objective(mix, STUDENT, TEACHER, engine)
        output = objective(own, theirs)
        found = gradients(output.total, leaves(own, objective))
        results.append((output.total.detach(), output.terms, found))
    torch.save(results, folder / f"rank{rank}.pt")
    if size == 2:
        torch.save(watch(rank), folder / f"watch{rank}.pt")
        torch.save(through_encoder(rank, wrap=True), folder / f"encoder{rank}.pt")
    dist.destroy_process_group()


def watch(rank: int) -> tuple[int, int]:
    """Elements of the largest matrix of a dense forward pass over WATCHED rows, and how often rows were gathered."""
    student, teacher = make_input(EVERYTHING, WATCHED, STUDENT, TEACHER)
    own, theirs = (part(given, rank * WATCHED // 2, (rank + 1) * WATCHED // 2) for given in (student, teacher))
    objective = make_objective(EVERYTHING, STUDENT, TEACHER, "dense")
    with Watch() as seen:
        objective(own, theirs)
    return seen.largest, sum(count for name, count in seen.collectives.items() if "allgather" in name)


def through_encoder(rank: int | None, *, wrap: bool) -> dict[str, torch.Tensor]:
    """Gradients of an encoder's parameters on this rank's share of seven rows (None: all of them)."""
    student, teacher = make_input(EVERYTHING, 7, STUDENT, TEACHER)
    start, stop = {None: (0, 7), 0: (0, 5), 1: (5, 7)}[rank]
    own, theirs = (part(given, start, stop) for given in (student, teacher))
    torch.manual_seed(3)
    encoder: torch.nn.Module = torch.nn.Linear(STUDENT, STUDENT).double()
    if wrap:
        encoder = DistributedDataParallel(encoder)
    # one forward call for everything, as DistributedDataParallel wants it
    assert own.synthetic_text is not None
    image, text, synthetic = encoder(torch.cat([own.image, own.text, own.synthetic_text])).chunk(3)
    objective = make_objective(EVERYTHING, STUDENT, TEACHER, "dense")
    objective(replace(own, image=image, text=text, synthetic_text=synthetic), theirs).total.backward()
    gradients = {name.removeprefix("module."): parameter.grad for name, parameter in encoder.named_parameters()}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def run_ranks(folder: Path, size: int, cases: list[Case]) -> list[Any]:
    multiprocessing.start_processes(worker, (size, folder, cases), nprocs=size, start_method="spawn")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(size)]


def close(ours: torch.Tensor, reference: torch.Tensor, scale: float) -> bool:
    return ours.shape == reference.shape and bool(((ours - reference).abs() <= 1e-10 * scale).all())


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 4))])
def test_equals_one_process(size: int, tmp_path: Path) -> None:
    """Every recipe on two ranks with uneven rows; the mixes that differ in kind on all splits."""
    splits = SPLITS[size]
    cases = [(mix, engine, counts) for mix in (EVERYTHING, "mobileclip") for engine in ENGINES for counts in splits]
    if size == 2:
        cases += [(mix, engine, (4, 1)) for mix in mix_names() for engine in ENGINES]
    compare(run_ranks(tmp_path, size, cases), cases)
    if size == 2:
        for rank in range(size):
            largest, gathers = torch.load(tmp_path / f"watch{rank}.pt", weights_only=True)
            assert largest <= WATCHED * WATCHED // 2  # a block of own rows, never N x N
            assert gathers == 2  # the row counts, then everybody's rows of every matrix together
            found = torch.load(tmp_path / f"encoder{rank}.pt", weights_only=True)
            for name, expected in through_encoder(None, wrap=False).items():
                assert close(found[name], expected, expected.abs().max().item()), name


@pytest.mark.slow
@pytest.mark.parametrize("size", sorted(SPLITS))
def test_every_recipe_on_every_split(size: int, tmp_path: Path) -> None:
    cases = [(mix, engine, counts) for mix in mix_names() for engine in ENGINES for counts in SPLITS[size]]
    compare(run_ranks(tmp_path, size, cases), cases)


def compare(ranks: list[Any], cases: list[Case]) -> None:
    """What the ranks found against one process with the whole batch."""
    size = len(ranks)
    for case, (mix, engine, counts) in enumerate(cases):
        what = f"{mix} {engine} {counts}"
        student, teacher = make_input(mix, sum(counts), STUDENT, TEACHER)
        objective = make_objective(mix, STUDENT, TEACHER, "dense")
        reference = objective(student, teacher)
        of = leaves(student, objective)
        expected = gradients(reference.total, of)
        offset = 0
        means = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
        for rank in range(size):
            total, terms, found = ranks[rank][case]
            assert close(total, reference.total.detach(), max(1.0, abs(reference.total.item()))), what
            assert total.item() == ranks[0][case][0].item(), what
            for name, value in reference.terms.items():
                assert close(terms[name], value, max(1.0, abs(value.item()))), f"{what} {name}"
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                if name in ("image", "text", "synthetic_text"):
                    # W times the own rows' gradient, so that DistributedDataParallel's mean over ranks is exact
                    own = size * expected[name][offset : offset + counts[rank]]
                    assert close(gradient, own, max(1.0, expected[name].abs().max().item())), f"{what} {name}"
                else:
                    means[name] += gradient / size
            offset += counts[rank]
        for name, mean in means.items():
            if name not in ("image", "text", "synthetic_text"):
                assert close(mean, expected[name], max(1.0, expected[name].abs().max().item())), f"{what} {name}"
