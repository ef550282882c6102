"""A small folder of drawn scenes, the shipped teacher, and a stand-in for a model that needs no network at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipdistill.models import build_student, load_model, save_model
from clipdistill.scenes.pairs import open_scenes
from clipdistill.search.collection import Collection
from clipdistill.search.encoder import SearchModel
from clipdistill.search.store import open_index
from clipdistill.search.update import update

HOSTILE = '<img src=x onerror="alert(1)">&"\'.png'


def draw(folder: Path, count: int = 20, size: int = 72) -> list[Path]:
    """`count` scenes as PNG files in `folder` and a sub-folder."""
    source = open_scenes("val", count, 0)
    paths = []
    for i in range(count):
        path = folder / ("more" if i % 3 == 2 else ".") / f"scene-{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.image(i).resize((size, size)).save(path)
        paths.append(path)
    return paths


class StandIn:
    """Looks like a SearchModel; its vector of a picture is the mean colour of its four quarters. Counts its work."""

    name = "stand-in"
    role = "student"
    device = torch.device("cpu")
    fingerprint = "0123456789abcdef" * 4
    description = {"name": name, "fingerprint": fingerprint, "embed_dim": 12}  # noqa: RUF012 - never changed

    def __init__(self, fail_after: int | None = None) -> None:
        self.encoded = 0
        self.fail_after = fail_after

    def expect(self, pictures: int) -> None:
        """It has no engine to choose."""

    def at_least(self) -> int:
        return 8

    def pixels(self, picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.resize((2, 2), Image.Resampling.BOX))

    def images(self, pixels: np.ndarray) -> np.ndarray:
        if self.fail_after is not None and self.encoded + len(pixels) > self.fail_after:
            raise KeyboardInterrupt
        self.encoded += len(pixels)
        flat = pixels.reshape(len(pixels), -1).astype(np.float32) + 1
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 scenes, one photograph with a hostile name and one broken file. Do not change it."""
    folder = tmp_path_factory.mktemp("photographs")
    paths = draw(folder)
    (folder / HOSTILE.replace("/", "")).write_bytes(paths[0].read_bytes())
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing more")
    return folder


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small student with random weights and the teacher's tokenizer."""
    teacher = load_model("scenes-teacher")
    folder = tmp_path_factory.mktemp("student") / "student"
    save_model(build_student("scenes-student", seed=0, tokenizer=teacher.tokenizer), folder)
    return folder


@pytest.fixture(scope="session")
def collection(photographs: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """The photographs indexed by both models."""
    index = tmp_path_factory.mktemp("index")
    sides = []
    for role, name in (("student", str(student)), ("teacher", "scenes-teacher")):
        model = SearchModel(name, role, "cpu")
        store = open_index(index, dict(model.description))
        update(store, photographs, model)
        sides.append((model, store))
    return Collection(photographs, sides)
