"""Logistic regression against scipy's own minimiser and scikit-learn's form, draws, and the command."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import clipdistill as cd
from clipdistill.cli import main
from clipdistill.data.open import open_labelled
from clipdistill.errors import InputError
from clipdistill.probe.linear import STRENGTHS, ProbeResult, ProbeResults, chosen_strength, drawn, fit, probe
from clipdistill.statistics.bootstrap import Interval
from tests.conftest import shared_folder


def clouds(count: int, classes: int, width: int, spread: float, seed: int):
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(7).standard_normal((classes, width))
    rows = centres[labels] + spread * generator.standard_normal((count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_the_minimum_is_that_of_autograd(strength):
    features, labels = clouds(60, 3, 5, 1.0, 0)
    found = fit(features, labels, 3, strength)
    weights = torch.tensor(found.weights, requires_grad=True)
    biases = torch.tensor(found.biases, requires_grad=True)
    logits = torch.tensor(features) @ weights.T + biases
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)) + strength / 2 * weights.square().sum()
    loss.backward()
    assert weights.grad.abs().max() < 1e-5  # a convex function has one minimum, where the slope vanishes
    assert biases.grad.abs().max() < 1e-5


def test_the_strength_is_chosen_on_held_out_rows():
    features, labels = clouds(400, 4, 30, 3.0, 1)
    rows = np.arange(400)
    strength = chosen_strength(features, labels, rows[:40], rows[40:], 4)
    scores = {
        s: (fit(features[:40], labels[:40], 4, s).predict(features[40:]) == labels[40:]).mean() for s in STRENGTHS
    }
    assert scores[strength] == max(scores.values())
    assert len(set(scores.values())) > 1


def test_draws_are_balanced_and_seeded():
    labels = np.array([0] * 9 + [1] * 3 + [4] * 5)
    groups = drawn(labels, 4, np.random.default_rng(0))
    assert [len(group) for group in groups] == [4, 3, 4]
    for group, label in zip(groups, (0, 1, 4)):
        assert (labels[group] == label).all()
        assert len(set(group.tolist())) == len(group)


@pytest.fixture
def folders(tmp_path):
    """Two sets of coloured squares, 12 and 6 pictures of three classes."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for name, colour in (("red", (200, 20, 20)), ("green", (20, 200, 20)), ("blue", (20, 20, 200))):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + generator.integers(-20, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def test_the_command_separates_colours(folders, capsys):
    out = folders / "probe.json"
    arguments = ["--train", str(folders / "train"), "--test", str(folders / "test"), "--shots", "1,4,all"]
    assert main(["probe", "scenes-teacher", *arguments, "--seeds", "3", "--quiet", "--json", str(out)]) == 0
    written = json.loads(out.read_text())["results"]
    assert [result["shots"] for result in written] == [1, 4, None]
    assert [len(result["draws"]) for result in written] == [3, 3, 1]
    assert [result["pictures"] for result in written] == [3, 12, 36]
    assert written[-1]["top1"]["value"] == 1.0
    assert {round(result["top1"]["low"], 3) for result in written} == {0.815}, (
        "draws that agree say nothing of the test"
    )
    assert "3 draws" not in capsys.readouterr().out
    results = ProbeResults([ProbeResult(4, Interval(0.9, 0.8, 1.0, 3, 3, 0.95), (0.9, 0.8, 1.0), (1e-3,) * 3, 12, 18)])
    assert results.table().rows[0][-1] == "3 draws"


def test_pictures_that_cannot_be_read_are_counted_and_said(folders, capsys):
    (folders / "train" / "red" / "0.png").write_bytes(b"no picture")
    (folders / "test" / "blue" / "1.png").write_bytes((folders / "test" / "blue" / "1.png").read_bytes()[:60])
    arguments = ["--train", str(folders / "train"), "--test", str(folders / "test"), "--quiet"]
    assert main(["probe", "scenes-teacher", *arguments, "--json", str(folders / "x.json")]) == 0
    [result] = json.loads((folders / "x.json").read_text())["results"]
    assert (result["pictures"], result["over"]) == (35, 17)
    assert sorted(key for key, _ in result["left_out"]) == ["test/blue/1.png", "train/red/0.png"]
    said = capsys.readouterr().out
    assert "17 pictures" in said
    assert "left out: 2 pictures that cannot be read" in said


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--shots", "0"], "'0' is neither"),
        (["--shots", "2,2"], "stands twice"),
        (["--shots", "13"], "no class of .* has more than 12"),
        (["--seeds", "0"], "at least 1"),
        (["--test", "{}/other"], "the class 'violet' of .* is not among"),
        (["--test", "{}/train"], "train is what is trained on"),
        (["--train", "{}/one", "--test", "{}/one"], "has one class"),
        (["--classes", "{}/names.txt"], "two classes of train have the same name"),
        (["--train", "{}/unread"], "1 of 3 classes have no picture in unread that can be read .the first is 'green'"),
        (["--json", "{}/names.txt"], "exists and is no file of probes"),
    ],
)
def test_what_cannot_be_is_one_sentence(folders, more, sentence, capsys):
    (folders / "other" / "violet").mkdir(parents=True)
    (folders / "other" / "red").mkdir()
    for name in ("violet", "red"):
        Image.new("RGB", (8, 8)).save(folders / "other" / name / "0.png")
    shutil.copytree(folders / "train" / "red", folders / "one" / "red")
    shutil.copytree(folders / "train", folders / "unread")
    for path in (folders / "unread" / "green").iterdir():
        path.write_bytes(b"no picture")
    (folders / "names.txt").write_text("a\na\nb\n")
    arguments = ["--train", str(folders / "train"), "--test", str(folders / "test")]
    assert main(["probe", "scenes-teacher", *arguments, "--quiet", *(word.format(folders) for word in more)]) != 0
    import re

    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.slow
def test_a_probe_of_real_photographs_beats_zero_shot():
    shared_folder("data/cifar10")
    model = cd.load_model("scenes-teacher", teacher=True)
    train = open_labelled(shared_folder("data/cifar10") / "cifar10_train5k.npz")
    test = open_labelled(shared_folder("data/cifar10") / "cifar10_test_a.npz")
    few, every = cd.probe(model, train, test, shots=(4, None), seeds=2, progress=False)
    assert 0.1 < few.top1.value < every.top1.value
    with pytest.raises(InputError):
        probe(model, train, test, shots=(0,))
