"""The public `evaluate` and `clipdistill eval`: both protocols, teacher beside student, notes, files, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import clipdistill as cd
from clipdistill.cli import main
from clipdistill.data.open import open_pairs
from clipdistill.embed.encode import EncodedPairs
from clipdistill.errors import InputError
from clipdistill.evaluate.command import geometry_file, write_geometry
from clipdistill.models import build_student, build_words_tokenizer, save_model
from clipdistill.statistics.scores import Scores
from tests.conftest import shared_folder
from tests.evaluate.conftest import ColourClasses, ColourPairs, colour_model


def test_the_public_function_is_callable_after_any_import() -> None:
    import clipdistill.evaluate.retrieval

    assert callable(cd.evaluate)
    assert cd.retrieval is clipdistill.evaluate.retrieval.retrieval
    scores = cd.evaluate(colour_model(), ColourPairs(), progress=False, intervals=False)
    assert scores.value("t2i_MRR") > 0.5


def test_both_protocols_are_named_and_kept_apart() -> None:
    model, source = colour_model(noise=0.3), ColourPairs(per_colour=6)
    standard = cd.evaluate(model, source, progress=False)
    first = cd.evaluate(model, source, protocol="first-caption", progress=False)
    own, other = standard.protocols()[0], first.protocols()[0]
    assert (own.name, own.images, own.captions, own.captions_per_image) == ("standard", 30, 60, "all")
    assert (other.name, other.images, other.captions, other.captions_per_image) == ("first-caption", 30, 30, "first")
    assert (own.positives, other.positives) == ("any caption of the image", "one to one")
    assert own.ties == "expected over random order"
    assert own.keys_sha256 != other.keys_sha256
    assert own.model_fingerprint == model.fingerprint()
    both = Scores([*standard, *first])
    assert len(both.table()) == 2
    with pytest.raises(InputError, match="different protocols"):
        both.table(split=False)


def test_student_teacher_and_retention_on_several_sets() -> None:
    sources = [ColourPairs(per_colour=4), ColourClasses(counts=(6, 6, 6, 6, 6), wrong=range(3))]
    scores = cd.evaluate(colour_model(noise=0.6, seed=2), sources, teacher=colour_model(), progress=False)
    assert scores.models() == ["student", "teacher"]
    assert [p.task for p in scores.protocols()] == ["retrieval", "zero-shot"]
    assert scores.value("top1", "teacher") == pytest.approx(27 / 30)
    kept = {(s.metric): s for s in scores.retention()}
    assert kept["top1"].value == pytest.approx(scores.value("top1", "student") / scores.value("top1", "teacher"))
    assert "t2i_median_rank" not in kept
    assert "ties" not in kept
    for score in scores:
        if score.metric == "ties":
            continue
        assert score.low is not None
        assert score.high is not None
        assert score.low <= score.value <= score.high, score
    by_metric = {s.metric: s.n for s in scores if s.model == "student"}
    assert (by_metric["i2t_R@1"], by_metric["t2i_R@1"], by_metric["top1"]) == (20, 40, 30)
    queries = scores.queries["student", scores.protocols()[0].question()]
    assert queries.values["t2i_R@1"].mean() == pytest.approx(scores.value("t2i_R@1", "student"))
    assert queries.clusters["t2i_R@1"].tolist() == np.repeat(np.arange(20), 2).tolist()


def test_mean_per_class_has_the_interval_of_its_own_mean() -> None:
    data = ColourClasses(counts=(12, 3, 3, 3, 3), wrong=range(6))
    scores = cd.evaluate(colour_model(), data, progress=False)
    score = next(s for s in scores if s.metric == "mean_per_class")
    queries = scores.queries["student", scores.protocols()[0].question()].values["mean_per_class"]
    assert queries.mean() == pytest.approx(score.value)
    assert score.value != pytest.approx(scores.value("top1"))


def test_what_was_lost_is_noted() -> None:
    scores = cd.evaluate(colour_model(), ColourPairs(bad=[1]), ks=(1, 5), progress=False, intervals=False)
    assert scores.notes == [
        "colours/val: 1 of 10 images could not be read and were left out (first: red-1, truncated image: 3 of 9 bytes)",
        "colours/val: 4 of 18 captions are longer than the 9 tokens of the student and were cut",
    ]
    assert scores.protocols()[0].images == 9
    assert all(s.low is None for s in scores)


def test_a_part_of_a_published_set_never_passes_for_the_whole() -> None:
    source = ColourPairs(name="dataset_flickr8k/val")
    scores = cd.evaluate(colour_model(), source, progress=False, intervals=False)
    protocol = scores.protocols()[0]
    assert (protocol.dataset, protocol.split) == ("flickr8k", "val")
    assert protocol.deviation == "10 images and 20 captions of 1,000 and 5,000"
    assert "not comparable with published numbers" in scores.notes[-1]
    with pytest.raises(InputError, match="flickr8k/val holds 10 images and 20 captions of 1,000 and 5,000"):
        cd.evaluate(colour_model(), source, progress=False, strict_counts=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "standrd"}, r"unknown retrieval protocol 'standrd' \(did you mean 'standard'"),
        ({"data": []}, "no data to evaluate on"),
        ({"data": "no/such/file.json"}, "no/such/file.json"),
        ({"dtype": "float8"}, "unknown number format 'float8'"),
        ({"captions": "last"}, "captions must be 'all'"),
        ({"captions": "first"}, "captions='first' contradicts the protocol 'standard'"),
        ({"captions": "all", "protocol": "first-caption"}, "contradicts the protocol 'first-caption'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cd.evaluate(colour_model(), **({"data": ColourPairs(), "progress": False} | settings))


def test_the_rule_for_captions_can_be_widened_and_narrowed() -> None:
    source = ColourPairs(name="dataset_coco/test")
    usual = cd.evaluate(colour_model(), source, progress=False, intervals=False).protocols()[0]
    whole = cd.evaluate(colour_model(), source, captions="all", progress=False, intervals=False).protocols()[0]
    assert (usual.captions_per_image, whole.captions_per_image) == ("first 5", "all")
    options = {"protocol": "first-caption", "progress": False, "intervals": False}
    one, other = (cd.evaluate(colour_model(), source, captions=rule, **options) for rule in ("first", "first 1"))
    assert one.protocols() == other.protocols()


def test_strict_counts_hold_for_labelled_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ColourClasses()
    monkeypatch.setattr(data, "deviation", lambda: "CIFAR-10: 20 images where 10,000 (test) are expected")
    scores = cd.evaluate(colour_model(), data, progress=False)
    assert "NOT the published set" in scores.protocols()[0].label()
    with pytest.raises(InputError, match="colour classes: CIFAR-10: 20 images"):
        cd.evaluate(colour_model(), data, progress=False, strict_counts=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small models of random weights, as folders."""
    source = open_pairs("scenes:val?size=40")
    tokenizer = build_words_tokenizer(caption for i in range(40) for caption in source.captions(i))
    made = []
    for seed in range(2):
        made.append(tmp_path_factory.mktemp("models") / f"m{seed}")
        save_model(build_student("scenes-student", seed=seed, tokenizer=tokenizer), made[-1])
    return made


def test_the_command_prints_and_writes(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    code = main(
        ["eval", str(folders[0]), "--teacher", str(folders[1]), "--data", "scenes:val?size=40", "--json", str(out)]
        + ["--k", "1,3", "--quiet", "--batch-size", "16"]
    )
    text = capsys.readouterr().out
    assert code == 0
    assert "retrieval, standard: scenes/val, 40 images" in text
    assert "i2t_R@3" in text
    assert "t2i_R@5" not in text
    stored = Scores.load(out)
    assert stored.models() == ["student", "teacher"]
    assert len(stored.queries) == 2
    code = main(
        ["eval", str(folders[0]), "--data", "scenes:val?size=40", "--protocol", "first-caption"]
        + ["--markdown", "--quiet", "--no-intervals"]
    )
    text = capsys.readouterr().out
    assert code == 0
    assert "**retrieval, first-caption: scenes/val, 40 images, 40 captions (first)**" in text
    assert "| metric | score |" in text


def test_several_models_and_sets_give_one_table_each_set(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = map(str, folders)
    sets = ["--data", "scenes:val?size=40", "--data", "scenes:zeroshot?size=40"]
    given = [*sets, "--quiet", "--no-intervals"]
    assert main(["eval", first, second, *given, "--json", str(tmp_path / "both.json")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("retrieval, standard") == 1
    assert first in shown
    assert second in shown
    both = Scores.load(tmp_path / "both.json")
    assert both.models() == [first, second]
    assert main(["eval", second, *given, "--json", str(tmp_path / "one.json")]) == 0
    for score in Scores.load(tmp_path / "one.json"):
        assert both.value(score.metric, second, score.protocol.dataset) == score.value
    assert main(["eval", first, first, *given]) == 2
    assert "named twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no-such.json"], "no-such.json"),
        (["--data", "scenes:val?size=4", "--k", "1,x"], "--k 1,x: give whole numbers"),
        (["--data", "scenes:val?size=4", "--dtype", "int8"], "unknown number format 'int8'"),
    ],
)
def test_the_command_says_what_is_wrong(
    folders: list[Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(folders[0]), *arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_real_photographs_and_labels(folders: list[Path]) -> None:
    data = shared_folder("data")
    sets = [
        data / "flickr8k" / "dataset_flickr8k.json",
        data / "coco_mini" / "annotations" / "captions_val_a.json",
        data / "cifar10" / "cifar10_test_a.npz",
        data / "imagenette" / "imagenette_val_a.tar",
        data / "flowers5" / "flowers5_a.tar",
        data / "imagenet_sample" / "imagenet1_even.tar",
    ]
    scores = cd.evaluate(folders[0], sets, progress=False)
    counts = [(p.dataset, p.images, p.classes) for p in scores.protocols()]
    assert counts == [
        ("flickr8k", 1000, None),
        ("captions_val_a", 50, None),
        ("cifar10_test_a", 5000, 10),
        ("imagenette_val_a", 500, 10),
        ("flowers5_a", 250, 5),
        ("imagenet1_even", 500, 1000),
    ]
    assert scores.protocols()[0].deviation is None
    # random weights are at chance: the interval of R@10 holds 10 of 1,000 images
    score = next(s for s in scores if s.metric == "t2i_R@10" and s.protocol.dataset == "flickr8k")
    assert score.low is not None
    assert score.low < 0.01 < 2 * score.value


def test_geometry_goes_where_reports_find_it(tmp_path: Path) -> None:
    found: dict[tuple[str, str], EncodedPairs] = {}
    source = ColourPairs(per_colour=4)
    teacher = colour_model(noise=0.5)
    cd.evaluate(colour_model(), source, teacher=teacher, progress=False, intervals=False, embeddings=found)
    assert set(found) == {("student", source.name), ("teacher", source.name)}
    write_geometry(found, tmp_path / "geometry.json")
    stored = json.loads((tmp_path / "geometry.json").read_text())
    assert stored["data"] == source.name
    assert stored["student"]["gap"] > 0
    assert 0 < stored["alignment"]["cka"]["image"] <= 1
    with pytest.raises(InputError, match="describes one set of image-caption pairs, and --data names none"):
        write_geometry({}, tmp_path / "none.json")
    (tmp_path / "run.json").write_text("{}")
    assert geometry_file("", str(tmp_path)) == tmp_path / "geometry.json"
    assert geometry_file("g.json", "any") == Path("g.json")
    with pytest.raises(InputError, match="is no run folder"):
        geometry_file("", "ViT-T-16")


def test_scores_that_say_nothing_are_marked() -> None:
    few = cd.evaluate(colour_model(), ColourPairs(per_colour=1), ks=(1, 10), progress=False, intervals=False)
    assert any("t2i_R@10" in note and "100 % for any model" in note for note in few.notes)
    model = colour_model()
    encode = model.module.encode_image
    model.module.encode_image = lambda images: torch.ones_like(encode(images))
    same = cd.evaluate(model, ColourPairs(per_colour=6), progress=False, intervals=False)
    assert any("embeddings of all 30 images are the same" in note for note in same.notes)


def test_what_was_found_when_a_set_was_opened_is_noted() -> None:
    source = ColourPairs()
    source.problems.add("hidden image", ".x.jpg")
    scores = cd.evaluate(colour_model(), source, progress=False, intervals=False)
    assert scores.notes[0].endswith("found when it was opened: 1 hidden image")


def test_strict_counts_of_a_set_without_published_counts_are_refused() -> None:
    with pytest.raises(InputError, match="no published counts are known"):
        cd.evaluate(colour_model(), ColourPairs(), strict_counts=True, progress=False)
