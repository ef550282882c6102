"""SugarCrepe and Winoground: readers, hand-worked metrics, ties, and the way through eval, files and comparisons."""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

import clipdistill as cd
from clipdistill.cli import main
from clipdistill.errors import InputError
from clipdistill.evaluate.matching import judged, open_matching
from clipdistill.models import save_model
from clipdistill.statistics.scores import Scores
from tests.data.test_benchmarks import crossmodal, webdataset
from tests.evaluate.conftest import COLOURS, ColourClasses, colour_model, picture


def coloured(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(COLOURS[colour]).save(path, "PNG")


def sugar_crepe(folder: Path) -> Path:
    """Two subsets; in swap_att the second item's own caption is the wrong one for a model that sees colours."""
    for number, colour in enumerate(("red", "green", "blue")):
        coloured(folder / "val2017" / f"{number:012d}.png", colour)
    (folder / "data").mkdir()
    subsets = {
        "add_obj": [(0, "a red square", "a green square"), (0, "red", "blue"), (1, "green", "red")],
        "swap_att": [(1, "a green square", "a red square"), (2, "green", "blue")],
    }
    for name, items in subsets.items():
        content = {
            str(3 * k): {"filename": f"{image:012d}.png", "caption": right, "negative_caption": wrong}
            for k, (image, right, wrong) in enumerate(items)
        }
        (folder / "data" / f"{name}.json").write_text(json.dumps(content))
    return folder


def winoground(folder: Path, *, zipped: bool = False) -> Path:
    """Three items: both ways right, the right way round by captions alone, and unseen by the model."""
    items = [("red", "blue", "red", "blue"), ("white", "red", "a white square", "red"), ("red", "blue", "blue", "red")]
    folder.mkdir(parents=True)
    lines = []
    for k, (one, other, first, second) in enumerate(items):
        for j, colour in enumerate((one, other)):
            coloured(folder / "images" / f"ex_{k}_img_{j}.png", colour)
        names = {f"image_{j}": f"ex_{k}_img_{j}" for j in (0, 1)}
        lines.append(json.dumps({"id": k, **names, "caption_0": first, "caption_1": second, "tag": "Swap"}))
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")
    if zipped:
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            for file in sorted((folder / "images").iterdir()):
                archive.write(file, f"images/{file.name}")
                file.unlink()
        (folder / "images").rmdir()
    return folder


# ---- metrics


def test_the_three_scores_of_winoground_by_hand() -> None:
    # rows: caption 0, caption 1; columns: picture 0, picture 1
    cosines = np.array(
        [
            [[0.9, 0.1], [0.2, 0.8]],  # everything right
            [[0.5, 0.6], [0.1, 0.9]],  # each picture prefers its caption, but caption 0 prefers picture 1
            [[0.5, 0.1], [0.6, 0.9]],  # each caption prefers its picture, but picture 0 prefers caption 1
            [[0.1, 0.9], [0.8, 0.2]],  # everything wrong
        ]
    )
    found = judged(cosines)
    assert found["text_score"].tolist() == [1, 1, 0, 0]
    assert found["image_score"].tolist() == [1, 0, 1, 0]
    assert found["group_score"].tolist() == [1, 0, 0, 0]


def test_a_constant_model_gets_what_chance_gets() -> None:
    found = judged(np.zeros((2, 2, 2)))
    assert [float(found[name][0]) for name in ("text_score", "image_score", "group_score")] == [
        pytest.approx(value) for value in (1 / 4, 1 / 4, 1 / 6)
    ]
    assert judged(np.ones((3, 2, 1)))["accuracy"].tolist() == [0.5, 0.5, 0.5]


def test_scores_agree_with_the_published_definition_on_random_cosines() -> None:
    cosines = np.random.default_rng(0).normal(size=(500, 2, 2))
    found = judged(cosines)
    for k, (c0, c1) in enumerate(cosines):
        text = c0[0] > c1[0] and c1[1] > c0[1]
        image = c0[0] > c0[1] and c1[1] > c1[0]
        assert (found["text_score"][k], found["image_score"][k]) == (text, image)
        assert found["group_score"][k] == (text and image)


# ---- from files to scores


def test_sugar_crepe_has_a_score_a_subset(tmp_path: Path) -> None:
    folder = sugar_crepe(tmp_path / "sugar_crepe")
    scores = cd.evaluate(colour_model(), folder, progress=False)
    assert scores.value("accuracy", dataset="sugar_crepe/add_obj") == 1
    assert scores.value("accuracy", dataset="sugar_crepe/swap_att") == 0.5
    protocol = scores.protocols()[0]
    assert (protocol.images, protocol.captions, protocol.task) == (2, 6, "matching")
    queries = next(iter(scores.queries.values()))
    assert queries.clusters["accuracy"].tolist() == [0, 0, 1]  # the two items of a picture are resampled together
    alone = cd.evaluate(colour_model(), folder / "data" / "swap_att.json", progress=False)
    assert alone.value("accuracy") == 0.5


def test_pictures_may_lie_elsewhere(tmp_path: Path) -> None:
    folder = sugar_crepe(tmp_path / "deep" / "down" / "sugar_crepe")
    (tmp_path / "coco").mkdir()
    (folder / "val2017").rename(tmp_path / "coco" / "val2017")
    with pytest.raises(InputError, match="say where they are with image_root"):
        open_matching(str(folder))
    found = open_matching(f"{folder}?images={tmp_path}/coco/val2017")
    assert found is not None
    assert [source.name for source in found] == ["sugar_crepe/add_obj", "sugar_crepe/swap_att"]
    with pytest.raises(InputError, match=r"unknown setting 'image' .did you mean 'images'"):
        open_matching(f"{folder}?image=x")


@pytest.mark.parametrize("zipped", [False, True])
def test_winoground_from_its_files(tmp_path: Path, zipped: bool) -> None:
    folder = winoground(tmp_path / "winoground", zipped=zipped)
    for name in (folder, folder / "examples.jsonl"):
        scores = cd.evaluate(colour_model(), name, progress=False)
        # white lies nearer to "white" than red does, but "red" and "white" are hard to tell on white
        texts, images, groups = (scores.value(f"{kind}_score") for kind in ("text", "image", "group"))
        assert texts >= 1 / 3
        assert images >= 1 / 3
        assert groups == pytest.approx(min(texts, images))
        assert next(iter(scores.queries.values())).values["group_score"].tolist()[0::2] == [1, 0]


def test_items_with_unreadable_pictures_are_left_out_and_said(tmp_path: Path) -> None:
    folder = winoground(tmp_path / "winoground")
    (folder / "images" / "ex_1_img_0.png").write_bytes(b"<html>")
    scores = cd.evaluate(colour_model(), folder, progress=False)
    assert {score.n for score in scores} == {2}
    assert any("winoground: 1 of 3 items were left out" in note for note in scores.notes)


def test_damaged_archives_are_told_and_bombs_are_not_unpacked(tmp_path: Path, monkeypatch) -> None:
    folder = winoground(tmp_path / "winoground", zipped=True)
    monkeypatch.setattr("clipdistill.evaluate.matching.LARGEST_FILE", 20)
    with pytest.raises(InputError, match=r"no image of winoground can be read .*at most 20 are read"):
        cd.evaluate(colour_model(), folder, progress=False)
    archive = folder / "images.zip"
    content = bytearray(archive.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 6] = 0x5E  # needs a version that nobody has
    archive.write_bytes(bytes(content))
    with pytest.raises(InputError, match="not readable as a zip archive"):
        open_matching(str(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"caption_1": ""}, "line 2: no text under 'caption_1'"),
        ({"caption_1": None}, "line 2: no text under 'caption_1'"),
        ({"image_0": "../../x"}, "line 2: no file name under 'image_0'"),
        ("{", "line 2: not JSON"),
        ("[]", "line 2: no file name under 'image_0'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, object] | str, said: str) -> None:
    folder = winoground(tmp_path / "winoground")
    lines = (folder / "examples.jsonl").read_text().splitlines()
    lines[1] = change if isinstance(change, str) else json.dumps(json.loads(lines[1]) | change)
    (folder / "examples.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=said):
        open_matching(str(folder))


def test_other_names_are_not_of_this_kind(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text('{"images": []}')
    for name in ("scenes", "nothing", str(tmp_path), str(tmp_path / "captions.json"), "torchvision:CIFAR10@x"):
        assert open_matching(name) is None


# ---- one call, several models, several sets


def test_one_call_measures_every_kind_and_prints_one_table(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("CLIPDISTILL_CACHE", str(tmp_path / "indexes"))
    models = [str(tmp_path / name) for name in ("one", "two")]
    for seed, path in enumerate(models):
        save_model(_saveable(seed), Path(path))
    sets = {
        "sugar": sugar_crepe(tmp_path / "sugar"),
        "wino": winoground(tmp_path / "wino"),
        "cars": webdataset(tmp_path / "cars"),
        "bikes": webdataset(tmp_path / "bikes", 1),
        "many": f"{crossmodal(tmp_path / 'xm3600')}:de+quz",
    }
    data = list(itertools.chain.from_iterable(("--data", str(place)) for place in sets.values()))
    out = tmp_path / "scores.json"
    assert main(["eval", *models, *data, "--quiet", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    table = shown[shown.index("all sets") :]
    rows = [line.split("  ")[0] for line in table.splitlines()]
    for name in ("sugar_crepe/add_obj", "winoground", "cars/test", "crossmodal3600/de", "crossmodal3600/quz"):
        assert name in rows
    assert "mean of 2 classification sets" in rows
    scores = Scores.load(out)
    assert scores.models() == models
    tops = [s.value for s in scores if s.metric == "top1" and s.model == models[0]]
    assert f"{50 * sum(tops):.1f}" in table.splitlines()[rows.index("mean of 2 classification sets")]
    # the same queries pair by pair, in a comparison of the two models
    assert {q.values.keys() >= {"text_score"} for q in scores.queries.values()} == {True, False}
    single = [tmp_path / f"{k}.json" for k in (0, 1)]
    for model, path in zip(models, single):
        assert main(["eval", model, "--data", str(sets["wino"]), "--quiet", "--json", str(path)]) == 0
    capsys.readouterr()
    assert main(["compare", *map(str, single)]) == 0
    assert "group_score" in capsys.readouterr().out


def _saveable(seed: int):
    from clipdistill.models import build_student, build_words_tokenizer

    words = [*COLOURS, "a square", "am general hummer suv 2000", "red_car", "blue car", "de quz 0 1 2 3"]
    return build_student("scenes-student", tokenizer=build_words_tokenizer(words), seed=seed)


def test_the_overview_has_a_column_a_model_and_leaves_single_sets_alone() -> None:
    scores = cd.evaluate(colour_model(noise=0.5), ColourClasses(), teacher=colour_model(), progress=False)
    table = scores.overview({"student": "small"})
    assert list(table.heads) == ["set", "metric", "small", "teacher"]
    assert [list(row)[:2] for row in table.rows] == [["colour classes", "top1"]]
    assert isinstance(table.markdown(), str)
    assert io.StringIO(table.markdown()).readline().startswith("| set")


def test_clip_benchmark_gives_the_same_accuracy(tmp_path: Path) -> None:
    theirs = pytest.importorskip("clip_benchmark.metrics.image_caption_selection")
    crepe = pytest.importorskip("clip_benchmark.datasets.sugar_crepe")
    import torch

    from clipdistill.data.views import ViewPolicy, normalise, render_pixels, sample_view

    folder, model = sugar_crepe(tmp_path / "crepe"), colour_model(noise=0.4, seed=3)
    ours = cd.evaluate(model, folder, progress=False, intervals=False)
    for name in ("add_obj", "swap_att"):
        read = crepe.SugarCrepe(str(folder / "val2017"), str(folder / "data" / f"{name}.json"))
        batches = []
        for image, texts in (read[k] for k in range(len(read))):
            view = sample_view(ViewPolicy(kind="evaluation"), *image.size, np.random.default_rng(0))
            pixels = torch.from_numpy(render_pixels(image.convert("RGB"), view, model.image))
            batches.append((normalise(pixels[None], model.image), [texts]))
        found = theirs.evaluate(model.module, batches, model.tokenizer, "cpu", amp=False)
        assert found["acc"] == pytest.approx(ours.value("accuracy", dataset=f"sugar_crepe/{name}"))
