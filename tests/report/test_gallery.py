"""The gallery: what is retrieved is what the embeddings say, and only our own pixels reach a page."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clipdistill.embed.encode import EncodedPairs
from clipdistill.errors import InputError
from clipdistill.report.data import read_runs
from clipdistill.report.gallery import THUMBNAIL, Gallery, read_galleries, reencode
from clipdistill.report.look import build_gallery
from clipdistill.report.tables import build_table
from tests.report.synthetic import data_uri, picture, write_gallery, write_run

IMAGES, CAPTIONS = 12, 2


class Pictures:
    """Twelve small pictures with two captions each."""

    name = "pictures"

    def __len__(self) -> int:
        return IMAGES

    def key(self, i: int) -> str:
        return f"key-{i}"

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(f"caption {j} of {i}" for j in range(CAPTIONS))

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        return picture(i)


def encoded(noise: float, seed: int = 0) -> EncodedPairs:
    """Embeddings in which every caption lies near its image, as far off as `noise` says."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.nn.functional.normalize(torch.randn(IMAGES, 16, generator=generator), dim=1)
    owner = torch.arange(IMAGES).repeat_interleave(CAPTIONS)
    text = image[owner] + noise * torch.randn(len(owner), 16, generator=generator)
    captions = [f"caption {j} of {i}" for i in range(IMAGES) for j in range(CAPTIONS)]
    numbers = torch.arange(CAPTIONS).repeat(IMAGES)
    keys = [f"key-{i}" for i in range(IMAGES)]
    return EncodedPairs(image, torch.nn.functional.normalize(text, dim=1), owner, keys, captions, numbers)


def build(models: dict[str, EncodedPairs], **options: Any) -> dict[str, Any]:
    return build_gallery(models, Pictures(), **options)  # type: ignore[arg-type]


def test_answers_are_the_highest_scores_and_hits_are_the_truth() -> None:
    model = encoded(0.4)
    gallery = build({"teacher": model}, queries=9, top=4)
    assert json.loads(json.dumps(gallery)) == gallery
    assert [q["kind"] for q in gallery["queries"]] == ["t2i"] * 6 + ["i2t"] * 3
    for query in gallery["queries"]:
        answers = query["models"]["teacher"]
        assert len(answers) == 4
        if query["kind"] == "t2i":
            row = model.captions.index(query["text"])
            scores = model.image @ model.text[row]
            truth = int(model.text_to_image[row])
            assert query["truth"] == model.keys[truth]
            expected = scores.topk(4)
            assert [a["key"] for a in answers] == [model.keys[i] for i in expected.indices]
            assert [a["hit"] for a in answers] == [int(i) == truth for i in expected.indices]
            assert [a["score"] for a in answers] == pytest.approx(expected.values.tolist(), abs=1e-4)
            assert query["ranks"]["teacher"] == int((scores > scores[truth]).sum()) + 1
        else:
            image = model.keys.index(query["image"])
            scores = model.text @ model.image[image]
            assert [a["text"] for a in answers] == [model.captions[i] for i in scores.topk(4).indices]
            assert all(a["hit"] == a["text"].endswith(f" of {image}") for a in answers)
        used = {a["key"] for a in answers if "key" in a} | {query.get("truth") or query["image"]}
        assert used <= set(gallery["thumbnails"])


def test_disagreement_is_sought_and_said() -> None:
    good, bad = encoded(0.0), encoded(0.0)
    bad.text[6] = -bad.image[3]  # its right picture becomes the last
    gallery = build({"teacher": good, "student": bad}, queries=3)
    chosen = {q["text"]: q["why"] for q in gallery["queries"] if q["kind"] == "t2i"}
    assert "caption 0 of 3" in chosen
    assert next(iter(chosen.values())) == "drawn at random"
    assert build({"teacher": good, "student": bad}, queries=3) == gallery


def test_models_of_other_samples_are_refused() -> None:
    other = encoded(0.1)
    other.keys[2] = "another"
    with pytest.raises(InputError, match="'b' was not encoded on the same samples as 'a'"):
        build({"a": encoded(0.1), "b": other})
    with pytest.raises(InputError, match="the sample 'another', which is not in the pair source"):
        build({"b": other})
    with pytest.raises(InputError, match="at least one model"):
        build({})


def test_thumbnails_are_small_jpegs_without_the_originals_metadata() -> None:
    large = Image.new("RGB", (900, 300), "red")
    buffer = io.BytesIO()
    large.save(buffer, format="JPEG", comment=b"secret place", exif=b"Exif\x00\x00secret place")
    safe = reencode("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    assert safe is not None
    uri, width, height = safe
    assert (width, height) == (THUMBNAIL, THUMBNAIL // 3)
    data = base64.b64decode(uri.partition(",")[2])
    assert data[:2] == b"\xff\xd8"
    assert b"secret" not in data


SVG = (
    "data:image/svg+xml;base64," + base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg' onload='x()'/>").decode()
)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "javascript:alert(1)",
        "https://example.org/a.png",
        "data:text/html;base64,PHNjcmlwdD4=",
        "data:image/png;base64,not base64!",
        "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n then nothing").decode(),
        SVG,
        data_uri(Image.new("RGB", (40, 40)))[:-200],
    ],
)
def test_what_is_not_a_picture_is_left_out(uri: str) -> None:
    assert reencode(uri) is None


def test_a_picture_of_too_many_pixels_is_left_out() -> None:
    assert reencode(data_uri(Image.new("L", (4000, 1001)))) is None


def read(*folders: Path, notices: list[str] | None = None) -> Gallery:
    runs = read_runs(folders)
    gallery = read_galleries(runs, build_table(runs), [] if notices is None else notices)
    assert gallery is not None
    return gallery


def test_galleries_of_several_runs_are_merged_by_query(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / m, m) for m in ("clip-kd", "clip-rd")]
    for folder in folders:
        write_gallery(folder / "gallery.json", ["teacher", "student"])
    gallery = read(*folders)
    assert len(gallery.queries) == 6
    for query in gallery.queries:
        assert [entry.label for entry, _, _ in query.answers] == ["teacher", "CLIP-KD", "CLIP-RD"]
    assert len(gallery.thumbnails) == 20
    assert all(uri.startswith("data:image/jpeg;base64,") for uri, _, _ in gallery.thumbnails.values())


def test_a_model_the_report_does_not_know_has_an_entry_of_its_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    write_gallery(tmp_path / "gallery.json", ["teacher", "rd", "stranger"])
    labels = {entry.label: entry.colour for entry, _, _ in read(folder).queries[0].answers}
    assert list(labels) == ["teacher", "CLIP-RD", "stranger"]
    assert len(set(labels.values())) == 3


def test_broken_galleries(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "rd")
    path = write_gallery(folder / "gallery.json", ["teacher", "student"])
    whole = json.loads(path.read_text())
    whole["thumbnails"]["scene-00000"] = SVG
    path.write_text(json.dumps(whole))
    notices: list[str] = []
    assert "scene-00000" not in read(folder, notices=notices).thumbnails
    assert notices == ["gallery.json: the thumbnail of 'scene-00000' is not a picture and was left out."]


@pytest.mark.parametrize(
    "change", [{"queries": 4}, {"thumbnails": []}, {"queries": [{"models": {"teacher": [3]}}]}, {"queries": [[]]}]
)
def test_a_gallery_of_another_shape_is_told_and_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_run(tmp_path / "rd")
    path = write_gallery(folder / "gallery.json", ["teacher", "student"])
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    runs, notices = read_runs([folder]), []
    assert read_galleries(runs, build_table(runs), notices) is None
    [notice] = notices
    assert notice.startswith(f"{path}: not as clipdistill writes it")
