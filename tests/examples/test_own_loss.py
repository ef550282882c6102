"""examples/own_loss.py in a folder of its own: on both engines, on two ranks, in a recipe, with --explain."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from clipdistill.errors import InputError
from clipdistill.objective import Embeddings, Objective, Term, register_term
from clipdistill.registry import TERMS, load_plugin
from tests.conftest import REPOSITORY
from tests.objective.plain import kl, random_embeddings, unit
from tests.reliability.support import Launcher

WEIGHTS = {"task": 1.0, "relations": 2.0, "huber": 10.0}
RECIPE = """
from: clip-kd
objective:
  weights: {relations: 2, huber: 10}
  relations_of: both
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """The example in a folder of its own, beside a recipe that uses it."""
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return Path(shutil.copy(REPOSITORY / "examples" / "own_loss.py", tmp_path))


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing a test registers is known to the next one."""
    yield
    import clipdistill.registry as registry

    registry._loaded.clear()
    for name in [name for name in TERMS.names() if TERMS.origin(name)]:
        TERMS._forget(TERMS.origin(name) or "")


@pytest.fixture
def command(plugin: Path, launcher: Launcher) -> Callable[..., str]:
    """Run `clipdistill train` with the example in its folder; what it said, where it ended with `code`."""
    whole = ["train", "--plugin", "own_loss.py", "--recipe", "mine.yaml", "--size", "debug"]
    return lambda *words, code=0: launcher.start(*whole, *words, folder=plugin.parent).finish(code)


def test_the_example_is_short_and_explained() -> None:
    text = (REPOSITORY / "examples" / "own_loss.py").read_text()
    assert len(text.splitlines()) < 60


def test_a_run_trains_with_it_and_explain_shows_it(plugin: Path, command: Callable[..., str]) -> None:
    shown = command("--out", "run", "--explain")
    for part in ("KL(u u^T / 0.1 || A0 A0^T / 0.1)", "relations_of=both (images or texts or both)", "own_loss.py"):
        assert part in " ".join(shown.split()), part
    command("--out", "run", "train.steps=2")
    assert (plugin.parent / "run" / "student" / "model.safetensors").is_file()
    wrong = command("--out", "other", "objective.relations_of=pixels", code=2)
    assert "objective.relations_of" in wrong
    misspelt = command("--out", "other", "objective.relation_of=both", code=2)
    assert "did you mean 'relations_of'" in misspelt


@pytest.mark.parametrize("engine", ["dense", "tiled"])
def test_the_value_is_the_formula_on_both_engines(plugin: Path, engine: str) -> None:
    load_plugin(plugin)
    student, teacher = random_embeddings(7, 5, 9.0, 1, trained=True), random_embeddings(7, 5, 9.0, 2)
    objective = Objective(WEIGHTS, 5, 5, engine=engine, relations_of="both", huber_beta=0.2).double()
    output = objective(student, teacher)
    images, texts = ([unit(given).detach() for given in pair] for pair in zip(parts(student), parts(teacher)))
    expected = sum(kl(theirs @ theirs.T / 0.1, ours @ ours.T / 0.1) for ours, theirs in (images, texts))
    assert output.terms["relations"].item() == pytest.approx(float(expected), rel=1e-10)
    distance = (images[0] - images[1]).abs()
    rows = torch.where(distance < 0.2, distance**2 / 0.4, distance - 0.1).sum(dim=1)
    assert output.terms["huber"].item() == pytest.approx(rows.mean().item(), rel=1e-10)


def parts(embeddings: Embeddings) -> tuple[torch.Tensor, torch.Tensor]:
    return embeddings.image, embeddings.text


def gradients(engine: str, rows: slice, **settings: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Total, and its gradient with respect to own student rows and the objective's parameters."""
    whole, theirs = random_embeddings(9, 5, 9.0, 1), random_embeddings(9, 8, 20.0, 2)
    image, text = (given[rows].clone().requires_grad_() for given in parts(whole))
    torch.manual_seed(0)
    objective = Objective({**WEIGHTS, "sharp": 1.0}, 5, 8, engine=engine, relations_of="both", **settings).double()
    output = objective(Embeddings(image, text, 9.0), Embeddings(*(p[rows] for p in parts(theirs)), logit_scale=20.0))
    parameters = list(objective.parameters())
    return output.total.detach(), list(torch.autograd.grad(output.total, [image, text, *parameters]))


SHARP = """
from clipdistill.objective import CrossEntropy, Pairing, Term, register_term

register_term(Term("sharp", scales={"own": 4.0}, primitives=lambda setting: (CrossEntropy("self", "columns", 1.0),),
                   pairings=(Pairing("self", "projected_image", "teacher_image", scale="own"),)))
"""


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name in ("own_loss.py", "sharp.py"):
        load_plugin(folder / name)
    rows = slice(0, 6) if rank == 0 else slice(6, 9)
    torch.save([gradients(engine, rows) for engine in ("dense", "tiled")], folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(plugin: Path) -> None:
    """Value and gradients, of a scale that a term owns too, with uneven rows."""
    (plugin.parent / "sharp.py").write_text(SHARP)
    multiprocessing.start_processes(worker, (plugin.parent,), nprocs=2, start_method="spawn")
    ranks = [torch.load(plugin.parent / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    load_plugin(plugin)
    load_plugin(plugin.parent / "sharp.py")
    total, expected = gradients("dense", slice(0, 9))
    for engine in range(2):
        for rank, rows in ((0, slice(0, 6)), (1, slice(6, 9))):
            found, own = ranks[rank][engine]
            assert found.item() == pytest.approx(total.item(), rel=1e-10)
            for ours, whole in zip(own[:2], expected[:2]):
                torch.testing.assert_close(ours, 2 * whole[rows], rtol=1e-9, atol=1e-11)
        for of_rank_0, of_rank_1, whole in zip(*(ranks[rank][engine][1][2:] for rank in range(2)), expected[2:]):
            torch.testing.assert_close((of_rank_0 + of_rank_1) / 2, whole, rtol=1e-9, atol=1e-11)


BASE = "import torch\nfrom clipdistill.objective import *\n"
ROWS = BASE + "register_term(Term('bad', row_loss=lambda batch: {value}, reads=('student_image', 'teacher_image')))\n"
PAIRS = BASE + "register_term(Term('bad', primitives=lambda setting: {value}, pairings=({pairings})))\n"
MISTAKES = {
    "wrong shape": (ROWS.format(value="batch['student_image']"), "tensor of shape (4,), got a tensor of shape (4, 5)"),
    "no tensor": (ROWS.format(value="3"), "got 3"),
    "not finite": (ROWS.format(value="batch['student_image'].sum(1) / 0"), "although every row it reads is finite"),
    "no gradient": (ROWS.format(value="batch['student_image'].detach().sum(1)"), "no gradient"),
    "exception": (ROWS.format(value="batch['student_image'].sum(7)"), "failed: IndexError"),
    "a name it does not read": (ROWS.format(value="batch['fused_text']"), "failed: KeyError"),
    "unknown pairing": (PAIRS.format(value="[CrossEntropy('studnt', 'rows', 1.0)]", pairings=""), "'student'"),
    "no primitive": (PAIRS.format(value="['student']", pairings=""), "expected CrossEntropy"),
    "wrong axis": (PAIRS.format(value="[CrossEntropy('student', 'row', 1.0)]", pairings=""), "rows or columns"),
    "weight": (PAIRS.format(value="[CrossEntropy('student', 'rows', float('nan'))]", pairings=""), "finite weight"),
    "nothing trained": (
        PAIRS.format(value="[CrossEntropy('teacher', 'rows', 1.0)]", pairings=""),
        "nothing is trained",
    ),
    "unknown rows": (
        PAIRS.format(value="()", pairings="Pairing('p', 'student_img', 'student_text', 'student'),"),
        "'student_image'",
    ),
    "unknown scale": (
        PAIRS.format(value="()", pairings="Pairing('p', 'student_image', 'student_text', 'pupil'),"),
        "unknown scale 'pupil'",
    ),
    "temperature": (
        PAIRS.format(value="()", pairings="Pairing('p', 'student_image', 'student_text', temperature=0.0),"),
        "expected it above 0",
    ),
    "widths": (
        PAIRS.format(
            value="[CrossEntropy('p', 'rows', 1.0)]",
            pairings="Pairing('p', 'student_image', 'teacher_text', 'student'),",
        ),
        "student_image is 5 wide, teacher_text 8",
    ),
    "option of another": (
        BASE + "register_term(Term('bad', row_loss=len, reads=('student_image',),"
        " options=(Option('vrd_target', int, 1, 'x'),)))",
        "term 'vrd_kl'",
    ),
    "default of an option": (
        BASE + "register_term(Term('bad', row_loss=len, reads=('student_image',),"
        " options=(Option('deep', int, 'x', 'x'),)))",
        "default does not fit",
    ),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_mistake_is_one_sentence_that_names_term_and_file(mistake: str, tmp_path: Path) -> None:
    text, fragment = MISTAKES[mistake]
    (tmp_path / "mine.py").write_text(text)
    student, teacher = random_embeddings(4, 5, 9.0, 1, trained=True), random_embeddings(4, 8, 9.0, 2)
    with pytest.raises(InputError) as caught:
        load_plugin(tmp_path / "mine.py")
        Objective({"bad": 1.0}, 5, 8)(student, teacher)
    sentence = str(caught.value)
    assert fragment in sentence
    assert "bad" in sentence or "pairing 'p'" in sentence
    assert "mine.py" in sentence
    assert "\n" not in sentence


def test_names_that_are_taken() -> None:
    with pytest.raises(InputError, match="'task' is taken already"):
        register_term(Term("task", row_loss=lambda batch: batch["student"], reads=("student",)))
    with pytest.raises(InputError, match="register_term: term must be Term, got 'mine'"):
        register_term("mine")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give one of primitives, feature_loss and row_loss"):
        Term("mine")


def test_rows_that_are_not_finite_are_not_blamed_on_the_term(plugin: Path) -> None:
    load_plugin(plugin)
    student, teacher = random_embeddings(4, 5, 9.0, 1, trained=True), random_embeddings(4, 5, 9.0, 2)
    student.image.data[0, 0] = float("nan")
    assert torch.isnan(Objective({"huber": 1.0}, 5, 5)(student, teacher).total)
