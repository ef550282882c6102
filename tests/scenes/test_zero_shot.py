"""Zero-shot tasks: balanced, labelled with the truth, and of pairs that training never shows."""

from __future__ import annotations

import numpy as np
import pytest

from clipdistill.data.open import open_labelled
from clipdistill.errors import InputError
from clipdistill.scenes.captions import WORDS
from clipdistill.scenes.pairs import scenes_vocabulary
from clipdistill.scenes.world import held_out_colours, held_out_texture
from clipdistill.scenes.zero_shot import TASKS, SceneLabels, open_scenes_zeroshot


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_the_truth_about_unseen_pairs(task: str) -> None:
    source = open_scenes_zeroshot(f"scenes:zeroshot/{task}?size=150")
    for i in range(150):
        scene, name = source.scene(i), source.class_names[source.label(i)]
        thing = scene.things[0]
        if task == "backgrounds":
            assert name in WORDS["ground"][scene.background]
            continue
        if task == "counts":
            assert name == {2: "two shapes", 3: "three shapes", 4: "four shapes"}[len(scene.things)]
            continue
        assert len(scene.things) == 1
        words = name.split()[1:]
        truth = {thing.shape, thing.colour, thing.texture, "shape"}
        assert set(words) <= truth
        unseen_colour = thing.colour in held_out_colours(thing.shape)
        unseen_texture = thing.texture == held_out_texture(thing.shape)
        assert unseen_texture if "texture" in task else unseen_colour


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_balanced_and_speak_the_vocabulary(task: str) -> None:
    source = open_scenes_zeroshot(f"scenes:zeroshot/{task}")
    shown, counts = np.unique(source.labels, return_counts=True)
    assert tuple(shown) == tuple(sorted(TASKS[task].shown))
    assert len(set(counts)) == 1
    assert len(set(source.class_names)) == len(source.class_names)
    assert isinstance(source.templates, tuple)
    words = {word for t in source.templates for name in source.class_names for word in t.format(name).split()}
    assert words <= set(scenes_vocabulary())


def test_same_pictures_with_distractors() -> None:
    plain, among_all = open_scenes_zeroshot("scenes:zeroshot"), open_scenes_zeroshot("scenes:zeroshot/shape-colour-all")
    assert (len(plain.class_names), len(among_all.class_names)) == (24, 144)
    for i in range(48):
        assert plain.class_names[plain.label(i)] == among_all.class_names[among_all.label(i)]
        assert plain.image(i).tobytes() == among_all.image(i).tobytes()


def test_source_contract() -> None:
    name = "scenes:zeroshot/colours?size=36&seed=1&pixels=80"
    source = open_labelled(name)
    assert isinstance(source, SceneLabels)
    assert len(source) == 36
    assert source.image(3).size == (80, 80)
    assert source.image(3).tobytes() == open_labelled(name).image(3).tobytes()
    assert source.known is None
    assert source.problems.summary() == ""
    other = open_labelled("scenes:zeroshot/colours?size=36&seed=2&pixels=80")
    assert other.fingerprint() != source.fingerprint()
    assert source.fingerprint() != open_labelled("scenes:zeroshot/colours?size=36&seed=1&pixels=64").fingerprint()
    assert open_labelled("scenes:zeroshot/shape-color").name == "scenes/zeroshot/shape-colour"


def test_bad_names() -> None:
    with pytest.raises(InputError, match="did you mean 'colours'"):
        open_labelled("scenes:zeroshot/colurs")
    with pytest.raises(InputError, match="size"):
        open_labelled("scenes:zeroshot?size=0")
