"""Public functions refuse an argument of another kind in one sentence that names it."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipdistill as cd
from clipdistill.arguments import checked
from clipdistill.errors import InputError


def _functions():
    for name in cd.__all__:
        found = getattr(cd, name)
        found = found.function if inspect.ismodule(found) else found
        if inspect.isfunction(found):
            yield pytest.param(name, found, id=name)


@pytest.mark.parametrize(("name", "function"), _functions())
def test_each_public_function_refuses_what_no_argument_of_it_can_be(name, function):
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind not in kinds]
    wrong = {p.name: _wrong(p.annotation) for p in parameters}
    wrong = {name: value for name, value in wrong.items() if value is not ...}
    assert wrong, "nothing of this function's arguments is held against its annotations"
    for parameter, value in wrong.items():
        given = {p.name: None for p in parameters if p.default is p.empty and p.annotation in ("Any", "Data")}
        given |= {p.name: _right(p.annotation) for p in parameters if p.default is p.empty and p.name not in given}
        with pytest.raises(InputError, match=f"^{name}: {parameter} must be "):
            function(**given | {parameter: value})


def _wrong(annotation):
    """A value of a kind that the annotation does not name; ... where it says nothing of kinds."""
    sides = {side.partition("[")[0].strip() for side in annotation.split("|")}
    silent = {"Any", "Literal", "Data", "Say", "EngineName"}
    return ... if sides & silent else "x" if "float" in sides else 1.5


def _right(annotation):
    known = {"Callable": len, "Sequence": [], "list": [], "int": 1, "float": 1.0, "bool": True, "Term": object()}
    return known.get(annotation.partition("[")[0], {} if "Config" in annotation else "x")


def test_a_device_is_a_name_or_torch_s_own_everywhere():
    takers = [f for f in (p.values[1] for p in _functions()) if "device" in inspect.signature(f).parameters]
    assert len(takers) > 10
    for function in takers:
        assert "torch.device" in inspect.signature(function).parameters["device"].annotation, function.__name__
    rows = cd.embed("scenes-teacher", "scenes:val?size=4", device=torch.device("cpu"), progress=False)
    assert len(rows.image) == 4
    cd.Objective({"task": 1}, np.int64(4), np.int32(4))  # a width out of numpy, too


def test_kinds_and_words():
    @checked
    def f(
        a: "str | Path",
        b: "int | None" = None,
        c: "Sequence[int]" = (),  # noqa: F821
        d: "str | Sequence[str]" = "",  # noqa: F821
        e: "torch.device | Mapping[str, Any] | None" = None,  # noqa: F821
        f: "float" = 0.0,
        g: "list[str | Path] | None" = None,
    ) -> tuple:
        """Words."""
        return a, b, c, d, e, f

    assert f(Path("x"), np.int64(3), range(2), ["y"], torch.device("cpu"), 1)[1] == 3
    assert (f.__name__, f.__doc__, str(inspect.signature(f))[:17]) == ("f", "Words.", "(a: 'str | Path',")
    for given, sentence in (
        ({"a": 3}, "f: a must be a text or a path, got 3"),
        ({"a": "x", "b": True}, "f: b must be a whole number or None, got True"),
        ({"a": "x", "c": 5}, "f: c must be a list of whole numbers, got 5"),
        ({"a": "x", "c": (1, "2")}, r"f: c must be a list of whole numbers, got '2' at \[1\]"),
        ({"a": "x", "g": [[], "y", 3.5]}, r"f: g must be a list of texts or paths or None, got \[\] at \[0\]"),
        ({"a": "x", "c": (i for i in range(3))}, "f: c must be a list of whole numbers, got <generator"),
        ({"a": "x", "d": 1}, "f: d must be a text or a list of texts, got 1"),
        ({"a": "x", "e": "cpu"}, "f: e must be device, a mapping or None, got 'cpu'"),
        ({"a": "x", "f": "1"}, "f: f must be a number, got '1'"),
        ({"a": "x" * 500, "b": "y" * 500}, "f: b must be a whole number or None, got '(y{79})$"),
    ):
        with pytest.raises(InputError, match=sentence):
            f(**given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bb'"):
        f("x", bb=3)
    with pytest.raises(InputError, match=r"ablate: drop must be a list of texts, got 'xrd'; write \['xrd'\]"):
        cd.ablate(["clip-rd"], "out", drop="xrd")


def test_places_are_taken_as_they_come(tmp_path, monkeypatch):
    """`~` is the home folder in arguments and settings; a Run, or whatever else is a path, stands for its folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    settings = {"recipe": "clip", "size": "debug", "device": "cpu", "data": {"path": Path("scenes:train")}}
    steps = {"steps": 1, "workers": 0, "batch_size": 8}
    run = cd.distill({**settings, "out": "~/run", "validation": "scenes:val?size=8", "train": steps}, quiet=True)
    assert run.folder == tmp_path / "home" / "run"
    more = cd.distill({**settings, "student_weights": run, "out": Path("~/more"), "train": steps}, quiet=True)
    assert "student_weights: ~" not in (more.folder / "recipe.yaml").read_text(encoding="utf-8")
    given = {"device": "cpu", "progress": False}
    assert cd.evaluate(run, "scenes:val?size=8", **given).value("t2i_R@1") == run.scores.value("t2i_R@1")
    assert cd.load_model("~/run").fingerprint() == cd.load_model(run).fingerprint()
    assert len(cd.compare([run], [Path("~/run")]).differences) > 5
    assert cd.embed_to_file(run, texts=["~/a cat"], out="~/texts.npy", **given).path == tmp_path / "home" / "texts.npy"
    assert cd.read_embeddings(Path("~/texts.npy"))[1][0]["text"] == "~/a cat"
    run.scores.save("~/scores.json")
    assert len(cd.Scores.load("~/scores.json")) == len(run.scores)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    with pytest.raises(InputError, match=r"^bench: models must be .*, got \{'a': 1\}$"):
        cd.bench({"a": 1})


def test_pictures_and_texts_are_taken_as_they_come(tmp_path):
    picture = Image.new("RGB", (80, 60), "red")
    picture.paste("blue", (0, 0, 40, 60))
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees to be upright
    turned.save(tmp_path / "turned.png", exif=exif)
    picture.save(tmp_path / "upright.png")
    _, preprocess, tokenizer = cd.load_student("scenes-teacher")
    pixels = np.asarray(picture)
    same = [picture, pixels, torch.from_numpy(pixels.copy()).permute(2, 0, 1), Image.open(tmp_path / "turned.png")]
    same += [tmp_path / "turned.png", str(tmp_path / "upright.png"), (tmp_path / "upright.png").read_bytes()]
    for given in same:
        assert preprocess(given).equal(preprocess(picture)), given
    for wrong in (None, [picture], pixels / 255, tmp_path):
        with pytest.raises(InputError, match=r"^preprocess: "):
            preprocess(wrong)
    rows = tokenizer(["a cat", "a red square"])
    assert tokenizer(np.array(["a cat", "a red square"])).equal(rows)
    assert tokenizer(text for text in ("a cat", "a red square")).equal(rows)
    for wrong in (None, [None], b"a cat", ["a cat", 3]):
        with pytest.raises(InputError, match=r"^caption [01] is .*, expected a text$"):
            tokenizer(wrong)
    report = cd.embed_to_file("scenes-teacher", same, tmp_path / "rows.npy", device="cpu", progress=False)
    assert same[3].getexif()[274] == 6, "looked at twice, and still turned"
    found, keys = cd.read_embeddings(report.path)
    assert np.abs(found - found[0]).max() < 1e-6
    assert [key["key"] for key in keys[:5]] == ["0", "1", "2", "3", str(tmp_path / "turned.png")]

    class Frame:  # what pandas' has
        iterrows = None

        def to_dict(self, orient):
            return [{"image": image, "caption": "a red square"} for image in same] if orient == "records" else None

    assert len(cd.embed("scenes-teacher", Frame(), device="cpu", progress=False).image) == len(same)
    for given, sentence in (
        ({"data": same, "captions": "all"}, "a list of pictures has no captions"),
        ({"data": tmp_path / "upright.png"}, "is one picture: name the folder that holds it"),
        ({"texts": "a cat"}, r"a cat: no such file of texts, .* \['a cat'\]"),
    ):
        with pytest.raises(InputError, match=sentence):
            cd.embed_to_file("scenes-teacher", out=tmp_path / "x.npy", progress=False, **given)
    with pytest.raises(InputError, match=r"upright.png' is a file: .* Path\("):
        cd.search(tmp_path, str(tmp_path / "upright.png"), model="scenes-teacher")


def test_what_the_classes_and_lists_take():
    rows = torch.ones(2, 4)
    for call, sentence in (
        (lambda: cd.Objective(["task"], 4, 4), "weights must be a mapping of terms and numbers"),
        (lambda: cd.Objective({"task": 1}, 4.5, 4), "embedding widths 4.5 and 4 must be positive whole numbers"),
        (
            lambda: cd.Objective({"task": 1}, 4, 4)(cd.Embeddings(rows.numpy(), rows.numpy(), 1.0)),
            "a torch.Tensor, got",
        ),
        (lambda: cd.retrieval([[1, 2], [3]], rows, [0, 1]), "the image embeddings must be numbers"),
        (lambda: cd.retrieval(rows.to(torch.complex64), rows, [0, 1]), "the image embeddings must be numbers"),
        (lambda: cd.claims([], []), "no run: give run folders"),
        (lambda: cd.Scores([3]), "results of the kind Score, got 3"),
        (lambda: cd.cache([], "scenes:val", "out"), "teacher: .*name at least one model"),
    ):
        with pytest.raises(InputError, match=sentence):
            call()


def test_a_mapping_that_is_given_to_be_filled_is_the_callers() -> None:
    @checked
    def fill(found: dict[str, str]) -> dict[str, str]:
        found["a"] = "b"
        return found

    mine: dict[str, str] = {"kept": "x"}
    assert fill(mine) is mine
    assert mine == {"kept": "x", "a": "b"}
