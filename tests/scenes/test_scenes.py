"""The built-in scenes: reproducible, held-out pairs kept apart, captions true, pictures showing what they claim."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clipdistill.data.images import decode
from clipdistill.errors import InputError
from clipdistill.scenes.captions import MAX_WORDS, place_of, relations_of
from clipdistill.scenes.draw import OUTLINES, REACH, draw_scene
from clipdistill.scenes.pairs import open_scenes, parse_scenes_name, scenes_vocabulary
from clipdistill.scenes.sheet import contact_sheet
from clipdistill.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    CORES,
    HOSTS,
    SHAPES,
    SIZES,
    TEXTURES,
    Dice,
    Scene,
    Thing,
    colours_on,
    held_out_colours,
    held_out_texture,
    sample_scene,
)
from clipdistill.scenes.zero_shot import TASKS
from tests.conftest import REPOSITORY
from tests.scenes.scene_reader import COLOURS as COLOUR_WORDS
from tests.scenes.scene_reader import SHAPES as SHAPE_WORDS
from tests.scenes.scene_reader import THING, background_of, falsehoods


def split_words(caption: str) -> list[str]:
    return caption.replace(",", " , ").split()


# ---- reproducibility


def test_samples_never_change() -> None:
    """Cached embeddings and published figures depend on it: who changes it raises WORLD_VERSION."""
    source = open_scenes("val", 200)
    text = "\n".join(caption for i in range(200) for caption in source.captions(i))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "cf116a017c65e79b"
    assert (
        source.captions(0)[4]
        == "little shaded orange half circle, small striped gray moon, large shaded white circle, night sky"
    )
    pixels = np.stack([np.asarray(source.image(i), dtype=np.float64) for i in range(50)])
    assert pixels.mean() == pytest.approx(124.84, abs=0.2)


def test_sample_depends_on_seed_split_index_only() -> None:
    few, many = open_scenes("train", 10, seed=3), open_scenes("train", 100_000, seed=3)
    for i in (0, 9):
        assert few.key(i) == many.key(i)
        assert few.captions(i) == many.captions(i)
        assert few.image(i).tobytes() == many.image(i).tobytes()
    reopened = pickle.loads(pickle.dumps(few))
    assert reopened.image(5).tobytes() == few.image(5).tobytes()
    others = [open_scenes("train", 10, seed=4), open_scenes("val", 10, seed=3)]
    assert all(other.captions(0) != few.captions(0) for other in others)
    assert few.scene(7) == sample_scene(3, "train", 7)


def test_order_of_access_does_not_matter() -> None:
    first, second = open_scenes("val", 6), open_scenes("val", 6)
    forwards = [(first.captions(i), first.image(i).tobytes()) for i in range(6)]
    backwards = [(second.captions(i), second.image(i).tobytes()) for i in reversed(range(6))]
    assert forwards == backwards[::-1]


def test_picture_size_keeps_the_scene() -> None:
    small, large = open_scenes("val", 5, pixels=64), open_scenes("val", 5, pixels=160)
    for i in range(5):
        assert small.captions(i) == large.captions(i)
        assert large.image(i).size == (160, 160)
        shrunk = large.image(i).resize((64, 64), Image.Resampling.BOX)
        difference = np.abs(np.asarray(shrunk, float) - np.asarray(small.image(i), float)).mean()
        assert difference < 25


def test_source_contract() -> None:
    source = open_scenes("train", 30)
    assert len(source) == 30
    assert len({source.key(i) for i in range(30)}) == 30
    assert all(len(source.captions(i)) == 5 for i in range(30))
    assert not source.problems
    decoded = decode(source.image_bytes(3))
    assert decoded.tobytes() == source.image(3).tobytes()
    assert decoded.mode == "RGB"
    with pytest.raises(IndexError):
        source.captions(30)
    fingerprints = {
        open_scenes(*a).fingerprint()
        for a in (("train", 30), ("train", 31), ("val", 30), ("train", 30, 1), ("train", 30, 0, 65))
    }
    assert len(fingerprints) == 5
    assert open_scenes("train", 30).fingerprint() == source.fingerprint()


# ---- names


def test_names_are_parsed() -> None:
    parsed = parse_scenes_name("scenes:train?size=4000&seed=1&pixels=96")
    assert parsed is not None
    assert (parsed.split, parsed.size, parsed.seed, parsed.pixels) == ("train", 4000, 1, 96)
    assert parse_scenes_name("scenes") is not None
    assert parse_scenes_name("scenes/0001.tar") is None
    assert parse_scenes_name("flickr.json") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scenes:", "a split is missing"),
        ("scenes?sise=3", "did you mean 'size'"),
        ("scenes?size=many", "whole numbers, got size='many'"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_scenes_name(name)


def test_bad_settings() -> None:
    for arguments, message in (
        (("vall",), "did you mean 'val'"),
        (("zeroshot/shapes",), "labelled set"),
        (("val", 0), "at least 1"),
        (("val", 5, -1), "seed"),
        (("val", 5, 0, 8), "between 16 and 1024"),
    ):
        with pytest.raises(InputError, match=message):
            open_scenes(*arguments)  # type: ignore[arg-type]


# ---- the world


def test_held_out_pairs_are_balanced() -> None:
    colours = [colour for shape in SHAPES for colour in held_out_colours(shape)]
    assert sorted(colours) == sorted(2 * list(COLOURS))
    assert all(len(set(held_out_colours(shape))) == 2 for shape in SHAPES)
    assert sorted(held_out_texture(shape) for shape in SHAPES) == sorted(2 * list(TEXTURES))


def test_held_out_pairs_are_kept_apart() -> None:
    for split in ("train", "val"):
        things = [thing for i in range(1500) for thing in sample_scene(0, split, i).things]
        assert not any(t.colour in held_out_colours(t.shape) or t.texture == held_out_texture(t.shape) for t in things)
        # everything else does occur
        assert {(t.shape, t.colour) for t in things} == {
            (s, c) for s in SHAPES for c in COLOURS if c not in held_out_colours(s)
        }
    test = [thing for i in range(1500) for thing in sample_scene(0, "test", i).things]
    share = np.mean([t.colour in held_out_colours(t.shape) or t.texture == held_out_texture(t.shape) for t in test])
    assert 0.2 < share < 0.4


def test_scenes_are_varied() -> None:
    scenes = [sample_scene(0, "train", i) for i in range(2000)]
    counts = np.bincount([len(scene.things) for scene in scenes], minlength=5)
    assert counts[0] == 0
    assert all(counts[1:] > 200)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {t.size for scene in scenes for t in scene.things} == set(SIZES)
    assert sum(bool(scene.inside) for scene in scenes) > 200
    assert sum(bool(scene.in_front) for scene in scenes) > 200
    assert len({scene.description() for scene in scenes}) >= 1990


def test_things_lie_within_the_picture_and_apart() -> None:
    for i in range(600):
        scene = sample_scene(1, "test", i)
        on_top = {pair for pairs in (scene.inside, scene.in_front) for a, b in pairs for pair in ((a, b), (b, a))}
        for a, first in enumerate(scene.things):
            assert SIZES[first.size][0] <= first.radius <= SIZES[first.size][1]
            assert first.radius <= first.x <= 1 - first.radius
            assert first.radius <= first.y <= 1 - first.radius
            assert first.colour in colours_on(scene.background)
            for b, second in enumerate(scene.things):
                distance = np.hypot(first.x - second.x, first.y - second.y)
                if a != b and (a, b) not in on_top:
                    assert distance > first.radius + second.radius
                if (a, b) in scene.in_front:
                    assert a > b
                    assert distance < CORES[first.shape] * first.radius + CORES[second.shape] * second.radius
                if (a, b) in scene.inside:
                    assert a > b
                    assert distance < second.radius


def test_outlines_fit_what_layout_assumes() -> None:
    assert set(OUTLINES) == set(SHAPES)
    for shape, corners in OUTLINES.items():
        assert np.hypot(*corners.T).max() < REACH
        for table in (CORES, HOSTS):
            if shape in table and shape != "ring":
                assert _clearance(corners) >= table[shape] - 1e-3


def _clearance(corners: np.ndarray) -> float:
    """Distance from the origin to the nearest edge of a polygon."""
    ends = np.roll(corners, -1, axis=0)
    along = ends - corners
    position = np.clip(-(corners * along).sum(1) / (along**2).sum(1), 0, 1)
    return float(np.hypot(*(corners + position[:, None] * along).T).min())


# ---- captions


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_captions_are_true(split: str) -> None:
    source = open_scenes(split, 500, seed=5)
    for i in range(500):
        scene = source.scene(i)
        for caption in source.captions(i):
            assert falsehoods(caption, scene) == [], (caption, scene)


def test_the_reader_finds_falsehoods() -> None:
    """What test_captions_are_true rests on: captions of another, mirrored or re-coloured scene are caught."""
    source = open_scenes("val", 300)
    elsewhere = mirrored = recoloured = moved = 0
    for i in range(299):
        scene, captions = source.scene(i), source.captions(i)
        mirror = replace(scene, things=tuple(replace(t, x=1 - t.x, y=1 - t.y) for t in scene.things))
        other = replace(scene, things=tuple(replace(t, texture="?", size="?") for t in scene.things))
        for caption in captions:
            elsewhere += bool(falsehoods(caption, source.scene(i + 1)))
            moved += bool(falsehoods(caption, replace(scene, background="?")))
        mirrored += bool(falsehoods(captions[3], mirror))
        recoloured += bool(falsehoods(captions[4], other))
    assert elsewhere > 0.99 * 5 * 299
    assert mirrored > 0.85 * 299
    assert recoloured > 0.5 * 299
    assert moved > 0.6 * 5 * 299


def test_captions_tell_what_they_promise() -> None:
    source = open_scenes("train", 300)
    for i in range(300):
        scene, captions = source.scene(i), source.captions(i)
        assert len(set(captions)) >= 4
        for number in (0, 1, 4):
            assert len(THING.findall(captions[number])) == len(scene.things)
            assert background_of(captions[number]) is not None
        for caption in captions:
            assert len(split_words(caption)) <= MAX_WORDS
            assert caption == " ".join(caption.split())
            assert "a orange" not in caption
            assert "a arrow" not in caption


def test_vocabulary_is_complete_small_and_free_of_dead_words() -> None:
    vocabulary = scenes_vocabulary()
    assert len(vocabulary) == len(set(vocabulary)) < 300
    source = open_scenes("test", 6000)
    used = {word for i in range(6000) for caption in source.captions(i) for word in split_words(caption)}
    assert used <= set(vocabulary)
    assert set(vocabulary) - used == set()


def test_relations_are_always_found_and_consistent() -> None:
    opposite = {
        **{"left of": "right of", "right of": "left of", "above": "below", "below": "above", "next to": "next to"},
        **{"above left of": "below right of", "below right of": "above left of"},
        **{"above right of": "below left of", "below left of": "above right of"},
        **{"inside": "around", "around": "inside", "in front of": "behind", "behind": "in front of"},
    }
    for i in range(400):
        scene = sample_scene(2, "test", i)
        for a in range(len(scene.things)):
            for b in range(a):
                found = relations_of(scene, a, b)
                assert found
                assert sorted(opposite[name] for name in found) == sorted(relations_of(scene, b, a))


def test_place_is_named_only_when_clear() -> None:
    def thing(x: float, y: float) -> Thing:
        return Thing("circle", "red", "plain", "small", x, y, 0.1, 0.0)

    assert place_of(thing(0.2, 0.2)) == "top left"
    assert place_of(thing(0.5, 0.2)) == "top"
    assert place_of(thing(0.8, 0.5)) == "right"
    assert place_of(thing(0.5, 0.5)) == "middle"
    assert place_of(thing(0.4, 0.4)) is None


# ---- pictures


@pytest.mark.parametrize("shape", SHAPES)
def test_picture_shows_shape_and_colour_where_said(shape: str) -> None:
    for colour, rgb in COLOURS.items():
        background = "white" if colour != "white" else "dark blue"
        thing = Thing(shape, colour, "plain", "large", 0.4, 0.55, 0.24, 0.0)
        image = np.asarray(draw_scene(Scene(background, (thing,)), 64, Dice("test", shape, colour)), dtype=float)
        near = np.abs(image - np.array(rgb)).max(axis=2) < 40
        rows, columns = np.nonzero(near)
        area = near.mean() / (np.pi * 0.24**2)
        assert 0.3 < area < 1.15, (shape, colour, area)
        assert abs(columns.mean() / 64 - 0.4) < 0.06
        assert abs(rows.mean() / 64 - 0.55) < 0.06


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_differ_but_keep_the_colour(texture: str) -> None:
    for colour in COLOURS:
        thing = Thing("square", colour, texture, "medium", 0.5, 0.5, 0.165, 0.0)
        image = np.asarray(draw_scene(Scene("gray", (thing,)), 64, Dice("test", texture, colour)), dtype=float)
        inner = image[26:39, 26:39].reshape(-1, 3)
        spread = inner.std(axis=0).max()
        assert spread < 6 if texture == "plain" else spread > 10, (colour, spread)
        main = np.abs(inner - np.array(COLOURS[colour])).max(axis=1) < 45
        assert main.mean() > 0.25, colour


def test_every_shape_looks_different() -> None:
    masks = {}
    for shape in SHAPES:
        thing = Thing(shape, "black", "plain", "large", 0.5, 0.5, 0.26, 0.0)
        masks[shape] = np.asarray(draw_scene(Scene("white", (thing,)), 64, Dice("same")).convert("L")) < 128
    for a in SHAPES:
        for b in SHAPES:
            if a < b:
                both = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
                assert both < 0.9, (a, b, both)


def test_later_things_lie_on_top() -> None:
    back = Thing("square", "red", "plain", "large", 0.5, 0.5, 0.26, 0.0)
    front = Thing("circle", "blue", "plain", "small", 0.5, 0.5, 0.1, 0.0)
    image = draw_scene(Scene("white", (back, front), inside=((1, 0),)), 64, Dice("test"))
    assert image.getpixel((32, 32))[2] > 150  # type: ignore[index]
    assert image.getpixel((32, 42))[0] > 150  # type: ignore[index]


@pytest.mark.parametrize("background", list(BACKGROUNDS))
def test_backgrounds_are_painted_in_their_palette(background: str) -> None:
    image = np.asarray(draw_scene(Scene(background, ()), 64, Dice("test", background)), dtype=float).reshape(-1, 3)
    palette = np.array(BACKGROUNDS[background], dtype=float)
    # colours on the way from one of the palette to another count: ramps, noise, soft edges
    way = np.linspace(0, 1, 33)[:, None]
    allowed = np.concatenate([a + (b - a) * way for a in palette for b in palette])
    distance = np.abs(image[:, None] - allowed[None]).max(axis=2).min(axis=1)
    assert (distance < 35).mean() > 0.7


def test_contact_sheet() -> None:
    sheet = contact_sheet("val", first=2, count=4, columns=2)
    assert sheet.width > 1000
    assert len(set(sheet.resize((64, 64)).getdata())) > 100


def test_captions_single_out_their_picture() -> None:
    """Retrieval has defined answers: hardly any caption is also true of another of 1,000 pictures."""
    source = open_scenes("val", 1000)
    scenes = [source.scene(i) for i in range(1000)]
    looks = [{(t.shape, t.colour) for t in scene.things} for scene in scenes]
    ambiguous = np.zeros(5)
    for i in range(0, 1000, 10):
        for number, caption in enumerate(source.captions(i)):
            named = {(SHAPE_WORDS[m["shape"]], COLOUR_WORDS[m["colour"]]) for m in THING.finditer(caption)}
            others = (scene for j, scene in enumerate(scenes) if j != i and named <= looks[j])
            ambiguous[number] += any(not falsehoods(caption, scene) for scene in others)
    share = ambiguous / 100
    assert all(share[:3] < 0.03)
    assert all(share < 0.12)


def test_documentation_states_what_is_so() -> None:
    text = (REPOSITORY / "docs" / "scenes.md").read_text(encoding="utf-8")
    for shape in SHAPES:
        assert f"| {shape} | {', '.join(held_out_colours(shape))} | {held_out_texture(shape)} |" in text
    for caption in open_scenes("test", 6).captions(5):
        assert f"| {caption} |" in text
    for task, about in TASKS.items():
        name = "scenes:zeroshot` (= `/shape-colour`)" if task == "shape-colour" else f"scenes:zeroshot/{task}`"
        assert f"| `{name} | {len(about.names)} |" in text
    assert f"vocabulary is {len(scenes_vocabulary()) - 1} words and the comma" in text
