"""The tiled engine on W ranks against the definitions on one: values, gradients, memory, number of exchanges."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipdistill.objective.engines import EngineOptions
from clipdistill.objective.engines.tiled import tiled
from clipdistill.objective.features import Features
from clipdistill.objective.gather import World
from clipdistill.objective.plan import Plan
from tests.objective.test_tiled import LARGE, LARGE_SCALES, with_scales
from tests.objective.tiled_cases import CLIP_RD, gradients, leaves, make_features, plan_of, random_plan, reference

# rows per rank: even, uneven, and a rank with nothing
SPLITS: dict[int, tuple[tuple[int, ...], ...]] = {2: ((6, 6), (9, 4), (0, 7)), 4: ((3, 3, 3, 3), (5, 0, 2, 9))}
TILE_ROWS = 4


def cases() -> list[tuple[Plan, float]]:
    """Plans, and the factor on some scales: the last needs shifts of its own per row and column."""
    return [(plan_of(CLIP_RD), 1.0), *((random_plan(seed), 1.0) for seed in range(12)), (plan_of(LARGE), 2000.0)]


def features_of(n: int, factor: float) -> Features:
    """Whole-batch features of a case, the same on every rank."""
    features = make_features(n)
    return features if factor == 1.0 else with_scales(features, dict.fromkeys(LARGE_SCALES, factor))


def part(features: Features, world: World) -> Features:
    """This rank's rows, as leaves of their own."""
    own = slice(world.offset, world.offset + world.counts[world.rank])
    rows = {n: m.detach()[own].clone().requires_grad_(m.requires_grad) for n, m in features.matrices.items()}
    return Features(rows, features.scales)


class Watch(TorchDispatchMode):
    """Elements of the largest tensor made by anything but the exchange of features, and collectives by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.collectives[func.overloadpacket.__name__] += 1
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def worker(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    results = []
    for counts in SPLITS[size]:
        world = World(counts, rank)
        for plan, factor in cases():
            own = part(features_of(world.total, factor), world)
            result = tiled(own, plan, world, EngineOptions(tile_rows=TILE_ROWS))
            results.append((result.total.detach(), result.terms, gradients(own, result.total)))
    world = World((128,) * size, rank)
    own = part(make_features(world.total), world)
    with Watch() as watch:
        tiled(own, plan_of(CLIP_RD), world, EngineOptions(tile_rows=32)).total.backward()
    torch.save((results, watch.largest, dict(watch.collectives)), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the larger of 1 and the expected magnitude; infinite when shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    return float((found - expected).abs().max()) / size if expected.numel() else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_one_process(size: int, tmp_path: Path) -> None:
    multiprocessing.start_processes(worker, (size, tmp_path), nprocs=size, start_method="spawn")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(size)]
    index = 0
    for counts in SPLITS[size]:
        for number, (plan, factor) in enumerate(cases()):
            what = f"case {number}, rows {counts}"
            features = features_of(sum(counts), factor)
            total, terms = reference(features, plan)
            expected = gradients(features, total)
            found = [ranks[rank][0][index] for rank in range(size)]
            index += 1
            for rank in range(size):
                assert difference(found[rank][0], total.detach()) < 1e-10, what
                assert found[rank][0].item() == found[0][0].item(), what
                for name, value in terms.items():
                    assert difference(found[rank][1][name], value.detach()) < 1e-10, f"{what} {name}"
            for name in leaves(features):
                parts = [found[rank][2][name] for rank in range(size)]
                if name.startswith("scale "):
                    mean = torch.stack(parts).mean(0)
                    assert difference(mean, expected[name]) < 1e-10, f"{what} {name}"
                else:
                    # W times the own rows' gradient, so that DistributedDataParallel's mean over ranks is exact
                    assert [len(gradient) for gradient in parts] == list(counts)
                    assert difference(torch.cat(parts) / size, expected[name]) < 1e-10, f"{what} {name}"
    n = 128 * size
    for _, largest, collectives in ranks:
        # kept tiles of one component, everything else is smaller; they are capped at a constant for large batches
        assert largest <= 2 * (n // size) * n
        gathers = sum(count for name, count in collectives.items() if "allgather" in name)
        assert gathers == 1
        # row lengths, column sums and the check on underflow per component, the terms, the gradients
        reductions = sum(count for name, count in collectives.items() if "allreduce" in name)
        assert reductions <= 1 + 2 * 3 + 1 + 1
