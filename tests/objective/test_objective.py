from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipdistill.config import build
from clipdistill.errors import InputError
from clipdistill.objective import TERMS, Embeddings, Objective, ObjectiveConfig
from clipdistill.train.config import resolve
from tests.objective.mixes import EVERYTHING, batch_terms, gradients, leaves, make_input, make_objective, mix_names
from tests.objective.plain import random_embeddings
from tests.objective.released import SETS, SIZES, assert_released, clip

CLIP_RD = {"task": 1, "crd": 1, "icl": 1, "fd": 2000, "vrd_kl": 1, "vrd_ce": 1, "xrd": 1}
CLIP_KD = {"task": 1, "crd": 1, "icl": 1, "fd": 2000}


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_clip_rd_total(student: int, teacher: int, scales: str) -> None:
    output = assert_released(clip("cliprd", student, teacher, scales), "total", CLIP_RD, projection="before-task")
    assert list(output.terms) == list(CLIP_RD)
    assert output.total.item() == pytest.approx(
        sum(weight * output.terms[name].item() for name, weight in CLIP_RD.items()), rel=1e-12
    )


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_clip_kd_total(student: int, teacher: int, scales: str) -> None:
    fixture = clip("clipkd", student, teacher, scales)
    assert_released(fixture, "total", CLIP_KD)
    everything = {**CLIP_KD, "cross_kd": 1, "gd": 1e8, **({"afd": 1} if student == teacher else {})}
    assert_released(fixture, "total_all", everything)


def test_projection_orders_differ_as_the_released_codes_do() -> None:
    fixture = clip("clipkd", 24, 32, "init")
    after = assert_released(fixture, "task", {"task": 1})
    before = assert_released(clip("cliprd", 24, 32, "init"), "task", {"task": 1}, projection="before-task")
    assert after.total.item() == pytest.approx(3.6162, abs=5e-5)
    assert before.total.item() == pytest.approx(2.1067, abs=5e-5)


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(weights: Mapping[str, float]) -> Counter[str]:
    student, teacher = random_embeddings(6, 5, 9.0, 1, trained=True), random_embeddings(6, 5, 20.0, 2)
    objective = Objective(weights, 5, 5, engine="dense")
    with CountOperations() as operations:
        objective(student, teacher)
    return operations.counts


def test_each_product_and_softmax_is_computed_once() -> None:
    counts = count(CLIP_RD)
    assert counts["mm"] == 6
    assert counts["_log_softmax"] == 12


def test_weight_zero_costs_nothing() -> None:
    assert count({"task": 1})["mm"] == 1
    for name in TERMS.names():
        if name != "task":
            assert count({"task": 1, name: 0}) == count({"task": 1})
    output = Objective({"task": 1, "xrd": 0}, 5, 5)(random_embeddings(4, 5, 9.0, 1))
    assert list(output.terms) == ["task"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"vrdkl": 1}, r"unknown term 'vrdkl' .did you mean 'vrd_kl'"),
        ({"task": 1, "zzz": 1}, "unknown term 'zzz'"),
        ({"task": -1}, "'task' is -1"),
        ({"task": math.nan}, "'task' is nan"),
        ({"task": "1"}, "'task' is '1'"),
        ({"task": 0}, "no term has a weight above 0"),
        ({}, "no term has a weight above 0"),
    ],
)
def test_wrong_weights(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Objective(weights, 4, 4)


def test_wrong_settings() -> None:
    with pytest.raises(InputError, match=r"scales: .* got .exp."):
        Objective({"task": 1}, 4, 4, scales="exp")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"reinforced_lambda: .* got 1\.5"):
        Objective({"reinforced": 1}, 4, 4, reinforced_lambda=1.5)
    with pytest.raises(InputError, match="must be positive"):
        Objective({"task": 1}, 0, 4)
    with pytest.raises(InputError, match="cross scale is -1"):
        Objective({"icl": 1}, 4, 4).set_scales(cross=-1)


def test_wrong_shapes() -> None:
    objective = Objective({"crd": 1}, 4, 6, engine="dense")
    student, teacher = random_embeddings(5, 4, 9.0, 1), random_embeddings(5, 6, 9.0, 2)
    with pytest.raises(InputError, match=r"student's image embeddings have shape \(5, 6\), expected \(5, 4\)"):
        objective(teacher, teacher)
    with pytest.raises(InputError, match=r"teacher's text embeddings have shape \(3, 6\), expected \(5, 6\)"):
        objective(student, replace(teacher, text=teacher.text[:3]))
    with pytest.raises(InputError, match="5 rows from the student and 2 from the teacher"):
        objective(student, replace(teacher, image=teacher.image[:2], text=teacher.text[:2]))
    with pytest.raises(InputError, match="need the teacher's embeddings"):
        objective(student)
    with pytest.raises(InputError, match="floating point"):
        objective(replace(student, image=student.image.long()), teacher)
    with pytest.raises(InputError, match="add up to 5, not 6"):
        objective(student, replace(teacher, blocks=(2, 3)))
    with pytest.raises(InputError, match="'crd' compares with one teacher"):
        objective(student, replace(teacher, blocks=(2, 4)))
    with pytest.raises(InputError, match="logit_scale has 3 values"):
        objective(student, replace(teacher, logit_scale=(1.0, 2.0, 3.0)))


def test_parameters_are_those_of_the_mix() -> None:
    assert not list(Objective({"task": 1, "affinity": 1, "crd": 1, "reinforced": 1}, 4, 6).parameters())
    names = {name for name, _ in Objective(CLIP_RD, 4, 4).named_parameters()}
    assert names == {"image_scale", "text_scale", "cross_scale"}
    names = {name for name, _ in Objective({"fd": 1}, 4, 6).named_parameters()}
    assert names == {f"{part}_projection.{kind}" for part in ("image", "text") for kind in ("weight", "bias")}
    # CLIP-RD's order projects whatever the mix
    early = Objective({"task": 1}, 4, 6, projection="before-task")
    assert early.image_projection is not None
    objective = Objective({"task": 1}, 4, 4)
    objective.set_scales(image=1.0, text=2.0, cross=3.0, fusion=4.0)  # none of them is in the mix
    assert objective.effective_scales() == {}


@pytest.mark.parametrize("reading", ["released", "exponential"])
def test_scales(reading: Any) -> None:
    objective = Objective(CLIP_RD, 4, 4, scales=reading)
    start = math.log(1 / 0.07) if reading == "released" else 1 / 0.07
    assert objective.effective_scales() == pytest.approx({"image": start, "text": start, "cross": start}, rel=1e-6)
    objective.set_scales(image=2.0, text=3.0, cross=4.0, fusion=5.0)
    assert objective.effective_scales() == pytest.approx({"image": 2.0, "text": 3.0, "cross": 4.0}, rel=1e-6)


def test_scales_are_exact_in_whatever_order() -> None:
    """Four numbers in float64 beside float32 layers: an optimiser and gradient clipping take both."""
    student, teacher = random_embeddings(5, 4, 9.0, 1), random_embeddings(5, 6, 9.0, 2)
    values = []
    for late in (True, False):
        torch.manual_seed(0)
        objective = Objective({"icl": 1, "vrd_ce": 1}, 4, 6)
        objective = objective if late else objective.double()
        objective.set_scales(image=2.1, text=5.3, cross=3.9)
        values.append(objective.double()(student, teacher).total.item())
    assert values[0] == values[1]
    objective = Objective({"icl": 1, "vrd_ce": 1}, 4, 6)
    optimiser = torch.optim.AdamW(objective.parameter_groups(0.1), lr=0.01)
    objective(random_embeddings(5, 4, 9.0, 1, dtype=torch.float32), teacher).total.backward()
    assert torch.nn.utils.clip_grad_norm_(objective.parameters(), 1e-3).item() > 0
    optimiser.step()
    assert objective.effective_scales()["cross"] != pytest.approx(math.log(1 / 0.07), abs=1e-4)


def test_parameter_groups_never_decay_scales() -> None:
    objective = Objective({**CLIP_RD, "afd": 1}, 4, 6)
    groups = objective.parameter_groups(weight_decay=0.1)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in objective.named_parameters():
        assert decays[id(parameter)] == (0.1 if name.endswith("weight") else 0.0)
    assert Objective({"task": 1}, 4, 4).parameter_groups() == []


def test_state_round_trip() -> None:
    first, second = (make_objective(EVERYTHING, 5, 8, "dense") for _ in range(2))
    first.set_scales(image=1.5, text=2.5, cross=3.5, fusion=4.5)
    second.load_state_dict(first.state_dict())
    student, teacher = make_input(EVERYTHING, 4, 5, 8)
    assert first(student, teacher).total.item() == second(student, teacher).total.item()


def test_terms_hold_no_graph() -> None:
    output = make_objective(EVERYTHING, 5, 8, "dense")(*make_input(EVERYTHING, 4, 5, 8))
    assert set(output.terms) == set(batch_terms())
    assert all(not value.requires_grad and value.ndim == 0 for value in output.terms.values())
    assert output.total.requires_grad
    assert output.total.ndim == 0


@pytest.mark.parametrize("engine", ["dense", "tiled"])
@pytest.mark.parametrize("mix", mix_names())
def test_autocast_changes_nothing(mix: str, engine: str) -> None:
    """Similarities are computed in float32 whatever the encoders use."""
    student, teacher = make_input(mix, 6, 5, 8, torch.float32)
    objective = make_objective(mix, 5, 8, engine, torch.float32)
    plain = objective(student, teacher).total
    with torch.autocast("cpu", torch.bfloat16):
        cast = objective(student, teacher).total
    assert cast.dtype == torch.float32
    assert cast.item() == pytest.approx(plain.item(), rel=1e-6)
    of = leaves(student, objective)
    for name, gradient in gradients(cast, of).items():
        torch.testing.assert_close(
            gradient, gradients(objective(student, teacher).total, of)[name], rtol=1e-4, atol=1e-6
        )


def trained_parts(recipe: str) -> tuple[str, ...]:
    """The modalities that a recipe's terms reach."""
    return {"images-only": ("image",), "promptkd": ("image",), "text-only": ("text",)}.get(recipe, ("image", "text"))


@pytest.mark.parametrize("engine", ["dense", "tiled"])
@pytest.mark.parametrize("mix", mix_names())
def test_half_precision_embeddings(mix: str, engine: str) -> None:
    student, teacher = make_input(mix, 6, 5, 8, torch.bfloat16)
    objective = make_objective(mix, 5, 8, engine, torch.float32)
    output = objective(student, teacher)
    assert output.total.dtype == torch.float32
    output.total.backward()
    for part in trained_parts(mix):
        gradient = getattr(student, part).grad
        assert gradient is not None
        assert gradient.dtype == torch.bfloat16
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("engine", ["dense", "tiled"])
@pytest.mark.parametrize("mix", mix_names())
def test_two_steps_before_backward_add_up(mix: str, engine: str) -> None:
    student, teacher = make_input(mix, 6, 5, 8)
    objective = make_objective(mix, 5, 8, engine)
    of = leaves(student, objective)
    other = replace(student, image=student.image.flip(0))
    first, second = objective(student, teacher).total, objective(other, teacher).total
    together = gradients(first + second, of)
    apart = [gradients(objective(one, teacher).total, of) for one in (student, other)]
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[0][name] + apart[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ["dense", "tiled"])
@pytest.mark.parametrize("mix", mix_names())
def test_micro_batches_with_whole_batch_negatives(mix: str, engine: str) -> None:
    """1 x B, 2 x B/2 and three uneven parts give the same gradient when the parts are encoded again."""
    student, teacher = make_input(mix, 6, 5, 8)
    objective = make_objective(mix, 5, 8, engine)
    encoder = torch.nn.Linear(5, 5).double()
    parts = [name for name in ("image", "text", "synthetic_text") if getattr(student, name) is not None]
    raw = {name: getattr(student, name).detach() for name in parts}

    def encode(rows: slice) -> dict[str, torch.Tensor]:
        return {name: encoder(raw[name][rows]) for name in parts}

    whole = objective(replace(student, **encode(slice(None))), teacher).total
    reference = torch.autograd.grad(whole, list(encoder.parameters()))
    for bounds in ((0, 3, 6), (0, 1, 3, 6)):
        with torch.no_grad():
            cached = encode(slice(None))
        cached = {name: matrix.requires_grad_() for name, matrix in cached.items()}
        of_features = gradients(objective(replace(student, **cached), teacher).total, cached)
        summed = [torch.zeros_like(parameter) for parameter in encoder.parameters()]
        for start, stop in itertools.pairwise(bounds):
            again = encode(slice(start, stop))
            surrogate = sum((again[name] * of_features[name][start:stop]).sum() for name in parts)
            for total, gradient in zip(summed, torch.autograd.grad(surrogate, list(encoder.parameters()))):
                total += gradient
        for ours, expected in zip(summed, reference):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in mix_names() if name != EVERYTHING])
def test_from_recipe(name: str) -> None:
    student, teacher = make_input(name, 4, 5, 8)
    objective = Objective.from_recipe(name, student_dim=5, teacher_dim=8, engine="dense").double()
    output = objective(student, teacher)
    output.total.backward()
    assert math.isfinite(output.total.item())
    for part in trained_parts(name):
        gradient = getattr(student, part).grad
        assert gradient is not None
        assert bool(gradient.any())


def test_from_recipe_with_changes() -> None:
    objective = Objective.from_recipe(
        "clip-rd", student_dim=4, teacher_dim=4, weights={"task": 2}, scales="exponential"
    )
    assert objective.weights == {"task": 2.0}
    assert objective.scales == "exponential"
    with pytest.raises(InputError, match="clip-rd"):
        Objective.from_recipe("clip-r", student_dim=4, teacher_dim=4)
    with pytest.raises(InputError, match="unknown key 'scale'"):
        Objective.from_recipe("clip-rd", student_dim=4, teacher_dim=4, scale="released")


def test_clip_rd_recipe_is_the_released_mix() -> None:
    assert Objective.from_recipe("clip-rd", student_dim=4, teacher_dim=4).weights == CLIP_RD


def test_rows_that_a_loss_needs() -> None:
    """One row says nothing to a term that compares pairs; a distance of rows is content with one."""
    assert ObjectiveConfig(weights={"fd": 1, "cosine": 2}).least_rows == 1
    for name in TERMS.names():
        alone = name in ("fd", "cosine", "cosine_image", "cosine_text", "class_kd") or TERMS.get(name).bank
        expected = 1 if alone else 2
        assert ObjectiveConfig(weights={"fd": 1, name: 1}).least_rows == expected
    settings = {"student": "scenes-student", "data": {"path": "scenes"}, "out": "x", "teacher": "scenes-teacher"}
    with pytest.raises(InputError, match=r"train.batch_size=1: terms of the mix \(task, crd, .* at least 2"):
        resolve("clip-rd", settings, assignments=["train.batch_size=1"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
def test_scales_and_weights_that_are_no_usable_numbers(value: float) -> None:
    with pytest.raises(InputError, match="scale is"):
        Objective({"icl": 1}, 4, 4).set_scales(cross=value)
    if value != 0:
        with pytest.raises(InputError, match=r"weight.*icl"):
            build(ObjectiveConfig, {"weights": {"task": 1, "icl": value}})
    with pytest.raises(InputError, match=r"weight.*icl.*True"):
        build(ObjectiveConfig, {"weights": {"task": 1, "icl": True}})
    with pytest.raises(InputError, match="reinforced_lambda"):
        Objective({"reinforced": 1}, 4, 4, reinforced_lambda=value if value != 0 else 2.0)
    with pytest.raises(InputError, match=r"unknown scale 'crss' .did you mean 'cross'"):
        Objective({"icl": 1}, 4, 4).set_scales(crss=2.0)


def test_configuration() -> None:
    config = build(ObjectiveConfig, {"weights": {"task": 1, "xrd": 0, "icl": 2}})
    assert config.active_terms == ("task", "icl")
    assert config.needs_teacher
    assert not config.accepts_ensemble
    assert Objective.from_config(config, 4, 6).weights == {"task": 1.0, "icl": 2.0}
    assert not ObjectiveConfig(weights={"task": 1, "sigmoid": 1}).needs_teacher
    assert ObjectiveConfig(weights={"task": 1, "afd": 1}).needs_teacher
    assert ObjectiveConfig(weights={"sigmoid": 1}, sigmoid_targets="teacher").needs_teacher
    assert ObjectiveConfig(weights={"task": 1, "reinforced": 1}).accepts_ensemble
    with pytest.raises(InputError, match=r"unknown term 'tusk' .did you mean 'task'"):
        build(ObjectiveConfig, {"weights": {"tusk": 1}}, "recipe x: objective")
    with pytest.raises(InputError, match="'icl' compares with one teacher"):
        Objective.from_config(config, 4, 6, teacher_blocks=(3, 3))
    with pytest.raises(InputError, match="do not add up to 6"):
        Objective.from_config(ObjectiveConfig(weights={"reinforced": 1}), 4, 6, teacher_blocks=(3, 4))


def test_explain_names_what_matters() -> None:
    text = Objective(CLIP_RD, 4, 6, engine="dense").explain(1024)
    for part in (
        "2000 fd",
        "k_c u B^T",
        "X detached",
        "k_i = 2.6593",
        "4 -> 6",
        "dense (as asked)",
        "products of N x N: 6",
    ):
        assert part in text
    text = Objective({"fd": 10, "gd": 1}, 512, 512, feature_units="cosine", scales="exponential").explain(64)
    assert "10 here is 2560 in released units at D=512" in text
    assert "gd_temperature=released" in text
    assert "no term compares all pairs" in text
    assert "trivial minimum" in Objective({"vrd_kl": 1}, 4, 4).explain()
    assert "exp of the parameter" in Objective({"icl": 1}, 4, 4, scales="exponential").explain()


def test_empty_batch_is_zero() -> None:
    student, teacher = make_input(EVERYTHING, 0, 5, 8)
    output = make_objective(EVERYTHING, 5, 8, "dense")(student, teacher)
    assert output.total.item() == 0
    output.total.backward()


def test_embeddings_keep_plain_numbers() -> None:
    rows = torch.eye(3)
    objective = Objective({"crd": 1, "sigmoid": 1}, 3, 3, engine="dense")
    numbers = objective(Embeddings(rows, rows, 5, logit_bias=-1), Embeddings(rows, rows, 10.0)).total
    tensors = objective(
        Embeddings(rows, rows, torch.tensor(5.0), logit_bias=torch.tensor([-1.0])),
        Embeddings(rows, rows, torch.tensor([10.0])),
    ).total
    assert numbers.item() == tensors.item()
