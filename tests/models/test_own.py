"""Modules from outside: what is read from them, found by trying, saved, read back, trained; and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

import clipdistill as cd
from clipdistill.errors import InputError
from clipdistill.export.foreign import export_foreign
from clipdistill.models import known, load_model, load_student, save_model
from clipdistill.models.inheritance.cut import inherit
from clipdistill.models.known import hold
from clipdistill.models.own import clip_model_of
from clipdistill.models.parameters import freeze
from clipdistill.registry import STUDENTS, TEACHERS


class Plain(nn.Module):
    """The least that can be a student."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.image = nn.Linear(3, width)
        self.text = nn.Embedding(49_408, width)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image(images.mean((2, 3)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.text(tokens).mean(1)


class Telling(Plain):
    """Says everything about itself, and holds what is awkward to save: tied, shared, transposed, a buffer."""

    image_size, image_mean, image_std = 48, (0.5, 0.5, 0.5), torch.full((3,), 0.25)
    embed_dim, context_length, vocab_size = 8, 5, 40

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Embedding(40, 8)
        self.tied = nn.Linear(8, 40, bias=False)
        self.tied.weight = self.text.weight
        self.turned = nn.Parameter(torch.randn(4, 6).T)
        self.register_buffer("part", torch.arange(12.0).reshape(3, 4)[:, 1])
        self.logit_scale = 2.0

    def tokenizer(self, captions: list[str]) -> Tensor:
        return torch.tensor([[1, *(1 + len(word) % 30 for word in c.split()[:3]), 39] for c in
                             [f"{c} x x x" for c in captions]])  # fmt: skip

    def encode_image(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == 48
        return super().encode_image(images)


@pytest.fixture
def name() -> Iterator[str]:
    """A registered student of this name, taken away afterwards."""
    cd.register_student("telling", Telling)
    yield "telling"
    STUDENTS._forget("this program")


def test_what_a_module_does_not_say_is_found_and_said(caplog: pytest.LogCaptureFixture) -> None:
    module = Plain()
    with caplog.at_level(logging.WARNING):
        model = clip_model_of(module)
    assert (model.name, model.embed_dim, model.image.size, model.context_length) == ("module:Plain", 8, 224, 77)
    assert model.module is module
    assert float(module.logit_scale.exp()) == pytest.approx(1 / 0.07)
    said = caplog.text
    assert "images of 224 x 224" in said
    assert "CLIP's tokenizer" in said
    assert "image mean and std" in said
    assert "logit scale of ln(1 / 0.07)" in said
    assert model.parameter_counts() == {
        "image": 32,
        "text_transformer": 395_264,
        "text_total": 395_264,
        "total": 395_297,
    }


def test_what_a_module_says_is_used() -> None:
    module = Telling().train()
    before = torch.get_rng_state()
    model = clip_model_of(module, "mine")
    assert torch.equal(torch.get_rng_state(), before)
    assert module.training
    assert (model.image.size, model.image.mean, model.image.std) == (48, (0.5,) * 3, (0.25,) * 3)
    assert (model.context_length, model.tokenizer.vocab_size) == (5, 0)
    assert float(module.logit_scale) == 2.0
    assert isinstance(module.logit_scale, nn.Parameter)
    assert model.tokenizer("one caption").shape == (1, 5)
    assert model.fingerprint() == model.fingerprint()


def test_a_module_of_open_clip_is_one_too() -> None:
    module = open_clip.create_model("ViT-B-32", pretrained=None)
    model = clip_model_of(module)
    assert (model.image.size, model.embed_dim, model.context_length) == (224, 512, 77)
    assert model.parameter_counts()["image"] == 87_849_216


def test_registered_students_are_saved_and_built_again(name: str, tmp_path: Path) -> None:
    model = cd.models.build_student(name, seed=3)
    assert model.fingerprint() == cd.models.build_student(name, seed=3).fingerprint()
    assert model.fingerprint() != cd.models.build_student(name, seed=4).fingerprint()
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.fingerprint() == model.fingerprint()
    assert isinstance(again.module, Telling)
    assert again.module.tied.weight is again.module.text.weight
    STUDENTS._forget("this program")
    with pytest.raises(InputError, match=r"is the registered student 'telling': load it with  --plugin test_own.py"):
        load_model(tmp_path / "model")


def test_a_module_without_a_name_is_asked_for(tmp_path: Path) -> None:
    module = Telling()
    save_model(clip_model_of(module), tmp_path / "model")
    with pytest.raises(InputError, match=r"class tests.models.test_own.Telling, .* load_student\(FOLDER, module="):
        load_model(tmp_path / "model")
    filled, preprocess, tokenizer = load_student(tmp_path / "model", module=Telling())
    assert torch.equal(filled.turned, module.turned)
    assert preprocess.image.size == 48
    assert tokenizer("x").shape == (1, 5)
    with pytest.raises(InputError, match="the weights are not those of the module"):
        load_student(tmp_path / "model", module=Plain())
    hold(module, "student")
    try:  # within the program that made it
        assert load_model(tmp_path / "model").module is not module
    finally:
        known._held.clear()


def test_names_that_are_taken_or_impossible(name: str) -> None:
    for bad in ("ViT-T-16", "ViT-B-16"):
        with pytest.raises(InputError, match="taken already, by clipdistill itself"):
            cd.register_student(bad, Plain)
    for bad in ("hf:x", "a/b", "a@b", "a b"):
        with pytest.raises(InputError, match="cannot be the name"):
            cd.register_student(bad, Plain)
    with pytest.raises(InputError, match="did you mean 'telling'"):
        cd.models.build_student("teling", seed=0)


def broken(**methods: Any) -> type[nn.Module]:
    return type("Broken", (Plain,), methods)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(2, 2), "with the methods encode_image and encode_text"),
        (
            broken(encode_image=lambda s, x: s.missing)(),
            "encode_image failed for images 224 x 224 .* attribute image_size",
        ),
        (broken(encode_image=lambda s, x: x)(), r"gave a tensor \(2, 3, 224, 224\) for two rows"),
        (broken(encode_image=lambda s, x: None)(), "gave NoneType for two rows"),
        (broken(encode_image=lambda s, x: torch.full((2, 8), float("nan")))(), "gave NaN or infinity"),
        (broken(encode_text=lambda s, x: torch.zeros(2, 9))(), "rows of 8 and 9 numbers"),
        (broken(encode_text=lambda s, x: 1 / 0)(), "encode_text failed for ids .*ZeroDivisionError"),
        (broken(embed_dim=7)(), "and embed_dim is 7"),
        (broken(image_size=(3, 4))(), "only square ones"),
        (broken(tokenizer=3)(), "its tokenizer must map"),
        (broken(tokenizer=lambda s, c: torch.zeros(1, 4))(), r"gave \(1, 4\) for"),
        (broken(logit_scale="x")(), "logit_scale must be one number"),
        (broken(logit_scale=property(lambda s: torch.ones(2)))(), "logit_scale must be one number"),
        (broken(image_std=(0, 0, 0))(), "std must be above 0"),
    ],
)
def test_what_cannot_be_a_model_is_one_sentence(module: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        clip_model_of(module)
    assert "\n" not in str(caught.value)


def test_a_builder_that_fails_is_named() -> None:
    cd.register_student("failing", lambda: {}["x"])
    cd.register_student("nothing", lambda seed: None)
    try:
        with pytest.raises(InputError, match=r"student 'failing' of this program failed: KeyError"):
            cd.models.build_student("failing", seed=0)
        with pytest.raises(InputError, match=r"student 'nothing' of this program: it returned NoneType"):
            cd.models.build_student("nothing", seed=0)
    finally:
        STUDENTS._forget("this program")


def test_modules_in_a_configuration_have_stable_names() -> None:
    student, teacher = Plain(), Plain()
    assert hold("ViT-T-16", "student") == "ViT-T-16"
    assert hold(student, "student") == "module:Plain"
    assert hold([teacher, "x", student], "teacher") == ("module:Plain.teacher", "x", "module:Plain.teacher3")
    assert load_model("module:Plain").module is student
    known._held.clear()
    with pytest.raises(InputError, match="run that program again"):
        load_model("module:Plain")


def test_extra_state_that_is_no_tensor_is_refused_before_training() -> None:
    cd.register_student("extra", type("Extra", (Plain,), {"get_extra_state": lambda self: {"a": 1}}))
    try:
        with pytest.raises(InputError, match="its state_dict holds '_extra_state', a dict"):
            cd.models.build_student("extra", seed=0)
    finally:
        STUDENTS._forget("this program")


SETTINGS: dict[str, Any] = {
    "recipe": "clip-kd", "size": "debug", "train": {"steps": 2, "batch_size": 8}, "preflight": {"enabled": False},
    "data": {"path": "scenes", "size": 16}, "validation": {"path": "scenes:val", "size": 8},
}  # fmt: skip


class Pictures(nn.Module):
    """A teacher that sees images alone, with a width of its own."""

    image_size = 32

    def encode_image(self, images: Tensor) -> Tensor:
        return images[:, :, ::8, ::8].flatten(1)


class Anything(nn.Module):
    """A teacher that makes its embeddings of whatever it likes: here of the captions' letters."""

    embed_dim = 6

    def teacher_embeddings(self, batch: Any) -> Any:
        rows = torch.tensor([[float(caption.count(letter)) for letter in "abcdef"] for caption in batch.captions])
        return rows + batch.teacher_images.mean((1, 2, 3))[:, None], rows + 0.1


@pytest.mark.parametrize("teacher", [Plain(16), Pictures(), Anything()], ids=["both", "pictures", "anything"])
def test_modules_teach_and_learn(teacher: nn.Module, tmp_path: Path) -> None:
    student = Telling()
    start = student.image.weight.detach().clone()
    run = cd.distill({**SETTINGS, "student": student, "teacher": teacher, "out": tmp_path / "run"}, quiet=True)
    assert run.status == "finished"
    assert not torch.equal(student.image.weight, start)
    assert run.scores is not None
    assert "student" in {score.model for score in run.scores}
    assert all(p.requires_grad for p in student.parameters())
    known._held.clear()
    module, _, _ = load_student(run.student, module=Telling())
    assert torch.equal(module.image.weight, student.image.weight)


def test_evaluation_of_a_module_leaves_it_as_it_was() -> None:
    module = Telling().train()
    scores = cd.evaluate(module, "scenes:val?size=8", progress=False, device="cpu")
    assert any(score.metric == "t2i_R@1" for score in scores)
    assert module.training
    assert all(p.requires_grad for p in module.parameters())


class Strict(Telling):
    """Takes captions of its own length alone, and says which lengths came."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        assert tokens.shape[1] == 5
        return super().encode_text(tokens)


def test_a_run_with_a_module_is_resumed_by_the_same_program(tmp_path: Path) -> None:
    settings = {**SETTINGS, "teacher": Pictures(), "out": tmp_path / "run"}
    first = Strict()
    cd.distill({**settings, "student": first}, quiet=True)
    known._held.clear()
    again = Strict()
    train = {**SETTINGS["train"], "steps": 3}
    run = cd.distill({**settings, "student": again, "train": train}, quiet=True, allow_changes=True)
    assert run.steps == 3
    assert not torch.equal(again.image.weight, first.image.weight)
    assert float((again.image.weight - first.image.weight).abs().max()) < 0.01  # one step from where the other ended


def test_a_kind_of_teacher_from_a_plugin_opens_by_the_word_before_the_colon() -> None:
    TEACHERS.register("mine", lambda name: Plain(int(name)))
    try:
        model = load_model("mine:12", teacher=True)
        assert (model.name, model.embed_dim, model.module.training) == ("mine:12", 12, False)
        with pytest.raises(InputError, match="teacher 'mine' of this program failed: ValueError"):
            load_model("mine:x")
    finally:
        TEACHERS._forget("this program")


def test_what_needs_modules_of_open_clip_says_so(tmp_path: Path) -> None:
    model = clip_model_of(Telling())
    with pytest.raises(InputError, match="its image size, 48, is fixed"):
        load_model(model, image_size=96)
    with pytest.raises(InputError, match="only open_clip's architectures can be built"):
        inherit(model, "all")
    with pytest.raises(InputError, match=r"freeze: 'image' is a tower of open_clip's models; name .* 'turned'"):
        freeze(model.module, ["image"])
    assert freeze(Plain(), ["image.weight"]) == 24
    with pytest.raises(InputError, match="module of your own, which hf cannot build: export it with --to onnx"):
        export_foreign(model, tmp_path / "out", "hf")
