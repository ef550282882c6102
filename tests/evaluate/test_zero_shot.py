"""Zero-shot classification: prompt ensembling by hand, top-5, means per class, restrictions, ties."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from clipdistill.embed.encode import Encoder
from clipdistill.errors import InputError
from clipdistill.evaluate.evaluate import evaluate
from clipdistill.evaluate.zero_shot import (
    ZeroShotResult,
    choose_templates,
    class_weights,
    classify,
    mean_average_precision,
    zero_shot,
)
from clipdistill.models.clip_model import ClipModel
from clipdistill.statistics.bootstrap import bootstrap
from tests.evaluate.conftest import COLOURS, ColourClasses, ColourPairs, colour_model


def test_class_weights_average_normalised_prompts(model: ClipModel) -> None:
    encoder = Encoder(model, progress=False)
    found = class_weights(encoder, ["red", "blue"], ["a {}", "the dark {} square"])
    module, tokenizer = model.module, model.tokenizer
    with torch.no_grad():
        for row, word in zip(found, ("red", "blue"), strict=True):
            prompts = module.encode_text(tokenizer([f"a {word}", f"the dark {word} square"]))
            prompts = prompts / prompts.norm(dim=1, keepdim=True)
            mean = prompts.mean(dim=0)
            torch.testing.assert_close(row, mean / mean.norm(), atol=1e-6, rtol=0)


def test_a_model_that_knows_colours_is_right(model: ClipModel) -> None:
    found = zero_shot(model, ColourClasses(), progress=False)
    assert found.scores() == {"top1": 1.0, "mean_per_class": 1.0}  # top-5 of five classes says nothing
    assert found.template_name == "plain (1)"
    assert found.class_names == tuple(COLOURS)


def test_mean_per_class_weighs_classes_equally(model: ClipModel) -> None:
    # 8 red of which 4 are labelled green, 2 right green, 2 of each other colour
    data = ColourClasses(counts=(8, 2, 2, 2, 2), wrong=range(4))
    found = zero_shot(model, data, progress=False)
    assert found.scores()["top1"] == pytest.approx(12 / 16)
    np.testing.assert_allclose(found.per_class(), [1, 2 / 6, 1, 1, 1])
    assert found.mean_per_class() == pytest.approx((4 + 2 / 6) / 5)
    assert found.top1.tolist() == [0.0] * 4 + [1.0] * 12
    absent = zero_shot(model, ColourClasses(counts=(3, 0, 1, 0, 0)), progress=False)
    assert np.isnan(absent.per_class()).tolist() == [False, True, False, True, True]
    assert absent.mean_per_class() == 1.0


def test_restriction_to_some_classes(model: ClipModel) -> None:
    data = ColourClasses(counts=(3, 2, 1, 1, 1))
    found = zero_shot(model, data, classes=["green", "red"], progress=False)
    assert found.class_names == ("green", "red")
    assert found.labels.tolist() == [1, 1, 1, 0, 0]
    assert found.left_out == 3
    assert found.keys == ["000", "001", "002", "003", "004"]
    for classes, message in (
        (["gren", "red"], "no class 'gren' .*'green'"),
        ([0, 7], "no class 7: its classes are numbered 0 to 4"),
        ([1], "at least two different classes"),
        ([1, 1], "at least two different classes"),
    ):
        with pytest.raises(InputError, match=message):
            zero_shot(model, data, classes=classes, progress=False)


def test_top5_and_ties_count_their_expectation() -> None:
    weights = torch.nn.functional.normalize(torch.tensor([[1.0, -i, 0.5] for i in range(8)]), dim=1)
    image = torch.tensor([[0.0, 1.0, 0.0]]).repeat(8, 1)
    top1, top5, predictions = classify(image, weights, np.arange(8))
    assert top1.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert top5.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert predictions.tolist() == [0] * 8
    # classes 0 to 2 are the same vector and come first
    weights[0:3] = weights[0]
    top1, top5, _ = classify(image, weights, np.arange(8))
    assert top1.tolist() == pytest.approx([1 / 3] * 3 + [0] * 5)
    assert top5.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    # a collapsed model is at chance
    top1, top5, _ = classify(image, weights[:1].repeat(8, 1), np.arange(8))
    assert top1.tolist() == pytest.approx([1 / 8] * 8)
    assert top5.tolist() == pytest.approx([5 / 8] * 8)


def test_templates_by_name_and_by_hand() -> None:
    name, lines = choose_templates("imagenet")
    assert (name, len(lines)) == ("imagenet (80)", 80)
    assert choose_templates(["a {c}", "the {}"]) == ("given (2)", ("a {}", "the {}"))
    with pytest.raises(InputError, match="must hold exactly one"):
        choose_templates(["no place"])


def test_settings_of_an_encoder_and_of_a_model_give_the_same() -> None:
    model = colour_model(noise=0.8, seed=3)
    data = ColourClasses(counts=(5, 5, 5, 5, 5))
    direct = zero_shot(model, data, ["a {}"], batch_size=2, progress=False)
    shared = zero_shot(Encoder(model, progress=False), data, ["a {}"])
    assert direct.predictions.tolist() == shared.predictions.tolist()
    assert direct.template_name == "given (1)"


class OtherNames(ColourClasses):
    """The same pictures under other class names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.class_names = tuple(names)


def test_classes_that_the_tokenizer_cannot_tell_apart_are_marked(model: ClipModel) -> None:
    data = OtherNames(["red", "green", "blue", "mauve", "ochre"])
    assert zero_shot(model, data, "plain").indistinct == [("ochre", "mauve")]
    scores = evaluate(model, data, progress=False, intervals=False)
    marked = "1 of 5 classes are to the tokenizer of the student the same as another"
    assert any(marked in note and "'ochre' and 'mauve'" in note for note in scores.notes)
    assert not any("the same as another" in note for note in evaluate(model, ColourClasses(), progress=False).notes)


def test_classes_of_unknown_words_alone_are_not_scored(model: ClipModel) -> None:
    with pytest.raises(InputError, match="all 5 classes are the same to the tokenizer of colours"):
        zero_shot(model, OtherNames(["mauve", "ochre", "teal", "puce", "taupe"]), "plain")


def test_a_set_of_one_class_is_not_scored(model: ClipModel) -> None:
    with pytest.raises(InputError, match="has one class, 'red'"):
        zero_shot(model, OtherNames(["red"]), "plain")


def test_captions_of_unknown_words_alone_are_noted(model: ClipModel) -> None:
    class Strange(ColourPairs):
        def captions(self, i: int) -> tuple[str, ...]:
            return ("xyzzy", "a red square") if i == 0 else super().captions(i)

    notes = evaluate(model, Strange(), progress=False, intervals=False).notes
    assert any("1 captions hold no word that the tokenizer of the student knows" in note for note in notes)


# ---- several classes a picture


def by_hand(cosines: np.ndarray, right: np.ndarray) -> float:
    """mAP of CLIP_benchmark's average_precision_per_class, over the classes that occur."""
    found = []
    for column in np.flatnonzero(right.any(axis=0)):
        ordered = right[np.argsort(-cosines[:, column], kind="stable"), column]
        found.append((ordered.cumsum() / np.arange(1, len(ordered) + 1))[ordered].mean())
    return float(np.mean(found))


def test_map_is_that_of_clip_benchmark_and_its_shares_are_what_a_picture_weighs() -> None:
    generator = np.random.default_rng(0)
    cosines, right = generator.normal(size=(30, 4)), generator.random((30, 4)) < 0.3
    right[:, 3] = False  # a class that does not occur counts nothing
    shares = mean_average_precision(cosines, right)
    assert shares.mean() == pytest.approx(by_hand(cosines, right), abs=1e-12)
    # a picture that is there twice: what it gains is its share above the mean, to first order
    many = 20  # of each picture, so that one more is a small change
    repeated = np.repeat(np.arange(30), many)
    for k in (0, 7, 29):
        rows = np.sort(np.append(repeated, k))
        # copies rank one behind the other: a small step between them leaves the order of the others as it is
        lower = cosines[rows] - 1e-6 * np.arange(len(rows))[:, None]
        base = cosines[repeated] - 1e-6 * np.arange(len(repeated))[:, None]
        gained = by_hand(lower, right[rows]) - by_hand(base, right[repeated])
        assert gained == pytest.approx((shares[k] - shares.mean()) / len(repeated), abs=2e-4)


def test_equal_cosines_count_the_expectation_over_their_order() -> None:
    right = np.array([[True], [False], [True], [False]])
    cosines = np.array([[0.5], [0.5], [0.5], [0.1]])
    orders = [by_hand(np.array([[r] for r in (*order, -1)]), right) for order in itertools.permutations((1, 2, 3))]
    assert mean_average_precision(cosines, right).mean() == pytest.approx(np.mean(orders))
    with pytest.raises(InputError, match="no image has any of the classes"):
        mean_average_precision(cosines, np.zeros((4, 1), dtype=bool))


def test_a_set_with_several_classes_a_picture_is_measured_by_map(model: ClipModel) -> None:
    data = ColourClasses()
    data.several = np.eye(5, dtype=bool)[data.labels]
    assert evaluate(model, data, progress=False).value("mAP") == 1.0
    data.several[0] = [False, True, False, False, False]  # a red picture that is said to be green
    scores = evaluate(model, data, progress=False)
    (score,) = scores
    assert score.low is not None
    assert score.low < score.value < 1.0
    assert score.n == 20
    assert "mAP" in scores.overview().lines()[-1] or "mAP" in repr(scores)
    (queries,) = scores.queries.values()
    assert queries.values["mAP"].mean() == pytest.approx(score.value)
    found = zero_shot(model, data, classes=["red", "green"], progress=False)
    assert found.labels.shape == (20, 2)


def result_of(top1: np.ndarray, labels: np.ndarray) -> ZeroShotResult:
    names = tuple(map(str, range(labels.max() + 1)))
    return ZeroShotResult(top1, top1, labels, labels, list(map(str, labels)), names, "t", ("{}",), 0, [], [])


@pytest.mark.parametrize("sizes", [(90, 10), (5, 200, 40), (30, 30)])
def test_the_interval_of_the_mean_per_class_is_that_of_resampled_samples(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    top1 = (rng.random(len(labels)) < 0.9 - 0.2 * labels).astype(float)
    found = result_of(top1, labels)
    values = found.queries()["mean_per_class"]
    assert values.mean() == pytest.approx(found.mean_per_class())
    draws = []
    for _ in range(2000):
        chosen = rng.integers(0, len(labels), len(labels))
        draws.append(result_of(top1[chosen], labels[chosen]).mean_per_class())
    assert bootstrap(values).high - bootstrap(values).low == pytest.approx(
        np.subtract(*np.quantile(draws, [0.975, 0.025])), rel=0.15
    )


def test_the_mean_per_class_of_a_perfect_model_is_as_sure_as_its_top1() -> None:
    labels = np.repeat([0, 1], [90, 10])
    queries = result_of(np.ones(100), labels).queries()
    assert bootstrap(queries["mean_per_class"]) == bootstrap(queries["top1"])


def test_intervals_of_shares_stay_within_the_possible(model: ClipModel) -> None:
    data = ColourClasses(counts=(40, 2, 2, 2, 2), wrong=range(1))
    for score in evaluate(model, data, progress=False):
        assert score.low is not None
        assert score.high is not None
        assert 0 <= score.low <= score.value <= score.high <= 1


def test_a_restriction_by_a_name_that_two_classes_have_is_refused(model: ClipModel) -> None:
    data = ColourClasses(counts=(3, 2, 1, 1, 1))
    data.class_names = ("crane", "crane", *data.class_names[2:])
    with pytest.raises(InputError, match="2 classes 'crane': choose by number"):
        zero_shot(model, data, classes=["crane", 2], progress=False)


def test_a_file_of_templates_is_read_each_time(tmp_path) -> None:
    file = tmp_path / "mine.txt"
    for line in ("a {}", "the {}"):
        file.write_text(line)
        assert choose_templates(str(file))[1] == (line,)
