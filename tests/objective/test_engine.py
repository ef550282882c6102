from __future__ import annotations

import torch

from clipdistill.objective import Objective
from clipdistill.objective.engines.choose import TILED_FROM, choose_engine, dense_bytes, load_engine
from clipdistill.objective.plan import CrossEntropy, Divergence, Sigmoid
from tests.objective.plain import random_embeddings

CPU = torch.device("cpu")
TASK = [CrossEntropy("student", "rows", 0.5), CrossEntropy("student", "columns", 0.5)]
PLENTY = 2**40


def test_small_batches_are_dense_and_large_ones_tiled() -> None:
    limit = TILED_FROM["cpu"]
    assert choose_engine(limit - 1, CPU, TASK, memory=PLENTY)[0] == "dense"
    name, reason = choose_engine(limit, CPU, TASK, memory=PLENTY)
    assert name == "tiled"
    assert str(limit) in reason


def test_memory_decides_before_speed() -> None:
    need = dense_bytes(100, TASK)
    assert choose_engine(100, CPU, TASK, memory=2 * need)[0] == "dense"
    name, reason = choose_engine(100, CPU, TASK, memory=2 * need - 2)
    assert name == "tiled"
    assert "available" in reason
    # two ranks hold half each
    assert choose_engine(100, CPU, TASK, world_size=2, memory=2 * need - 2)[0] == "dense"


def test_nothing_to_tile_is_dense() -> None:
    assert choose_engine(10**6, CPU, [], memory=1) == ("dense", "no term compares all pairs")


def test_estimate_is_near_what_autograd_keeps() -> None:
    """Bytes of the N x N tensors that autograd saves for the CLIP-RD mix are within a factor of two of the estimate."""
    n = 256
    objective = Objective({"task": 1, "crd": 1, "icl": 1, "vrd_kl": 1, "vrd_ce": 1, "xrd": 1}, 4, 4, engine="dense")
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == n * n:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    student, teacher = (random_embeddings(n, 4, 9.0, seed, trained=True, dtype=torch.float32) for seed in (1, 2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = objective(student, teacher)
    estimate = dense_bytes(n, objective.mix(objective.setting).all_primitives)
    assert output.total.requires_grad
    assert sum(saved.values()) <= estimate <= 3 * sum(saved.values())


def test_estimate_counts_each_kind() -> None:
    one = 4 * 10 * 10
    assert dense_bytes(10, [CrossEntropy("a", "rows", 1.0)]) == 3 * one
    assert dense_bytes(10, [Divergence("a", "b", "rows", 1.0)]) == (2 + 4 + 2) * one
    assert dense_bytes(10, [Sigmoid("a", 1.0, ("t",))]) == (2 + 3) * one
    assert dense_bytes(10, TASK, world_size=4, itemsize=8) == (1 + 4) * 3 * 10 * 8


def test_auto_is_used_and_reported() -> None:
    student, teacher = (random_embeddings(6, 4, 9.0, seed, dtype=torch.float32) for seed in (1, 2))
    objective = Objective({"task": 1, "crd": 1}, 4, 4)
    assert objective(student, teacher).engine == "dense"
    objective._choices = dict.fromkeys(objective._choices, ("tiled", "tested"))
    assert objective(student, teacher).engine == "tiled"
    assert load_engine("dense") is not load_engine("tiled")


def test_memory_estimate_grows_with_the_square_only_when_dense() -> None:
    weights = {"task": 1, "crd": 1, "fd": 1}
    dense, tiled = (Objective(weights, 64, 64, engine=name).estimate_bytes for name in ("dense", "tiled"))
    assert dense(4096) > 10 * dense(1024)
    assert tiled(4096) == 4 * tiled(1024)
    assert tiled(8192) < dense(8192) / 5
