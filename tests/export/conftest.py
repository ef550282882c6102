"""A tiny model and its ONNX export, made once for all tests of this folder."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipdistill.data.pairs import PairSource
from clipdistill.data.problems import Problems
from clipdistill.export import folder
from clipdistill.models import ClipModel, build_student, build_words_tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "grey": (128, 128, 128)}


def tiny_architecture(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "embed_dim": 24,
        "quick_gelu": False,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1},
    }
    return values | changes


class Squares(PairSource):
    """Sixteen pictures, four shades of four colours, two captions each."""

    def __init__(self) -> None:
        self.name, self.problems = "squares/test", Problems()

    def __len__(self) -> int:
        return 16

    def key(self, i: int) -> str:
        return f"{i:02d}"

    def captions(self, i: int) -> tuple[str, ...]:
        colour = list(COLOURS)[i % 4]
        return f"a {colour} square number {i // 4}", f"the picture is {colour}, isn't it?"

    def image_bytes(self, i: int) -> bytes:
        colour = [min(255, c + 12 * (i // 4)) for c in list(COLOURS.values())[i % 4]]
        noise = np.random.default_rng(i).integers(0, 12, (40, 50, 3))
        data = io.BytesIO()
        Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(data, "PNG")
        return data.getvalue()


@pytest.fixture(scope="session")
def squares() -> Squares:
    return Squares()


@pytest.fixture(scope="session")
def tiny(squares: Squares) -> ClipModel:
    captions = [caption for i in range(len(squares)) for caption in squares.captions(i)]
    return build_student(tiny_architecture(), seed=0, tokenizer=build_words_tokenizer(captions, 12))


@pytest.fixture(scope="session")
def exported(tiny: ClipModel, squares: Squares, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model's ONNX export, with R@1 before and after in its manifest."""
    for package in ("onnx", "onnxscript", "onnxruntime", "tokenizers"):
        pytest.importorskip(package)
    from clipdistill.export.graphs import export_graphs

    return export_graphs(tiny, tmp_path_factory.mktemp("export") / "tiny", test=squares).folder


@pytest.fixture(autouse=True)
def every_part_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an export writes must be known as its own: the next one into the same folder keeps everything else."""
    real = folder.new_folder

    @contextmanager
    def checked(out: Path, replaces: Any, what: str, made: Callable[[Path], bool]) -> Iterator[Path]:
        with real(out, replaces, what, made) as new:
            yield new
            parts = [part.relative_to(new) for part in new.rglob("*")]
            assert [str(part) for part in parts if not made(part) and part.parts[0][0] != "."] == []

    monkeypatch.setattr(folder, "new_folder", checked)
