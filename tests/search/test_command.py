"""`clipdistill search` from the terminal."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdistill.cli import main
from clipdistill.data.images import decode
from clipdistill.errors import InputError
from clipdistill.search.collection import Answer, Collection, times_as_fast
from clipdistill.search.command import print_answers
from clipdistill.search.encoder import SearchModel
from clipdistill.search.page import Question, render


def test_text_and_image_queries(
    photographs: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["search", str(photographs), "--model", "scenes-teacher", "--index", str(tmp_path / "i"), "--quiet"]
    assert main([*base, "--query", "a red circle", "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert "21 photographs searched in" in shown
    assert "(exact)" in shown
    assert main([*base, "--image", str(photographs / "scene-01.png"), "--json", "--no-update"]) == 0
    answer = json.loads(capsys.readouterr().out)
    hits = answer["answers"][0]["hits"]
    assert len(hits) == 10
    assert hits[0]["file"] == "scene-01.png"
    assert hits[0]["score"] == pytest.approx(1, abs=1e-5)
    assert answer["answers"][0]["encode_ms"] > 0


def test_index_summary_lists_what_cannot_be_read(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["search", str(photographs), "--model", "scenes-teacher", "--index", str(tmp_path / "i")]
    assert main(base) == 0
    shown = capsys.readouterr().out
    assert "21 photographs in the index; 21 encoded (" in shown
    assert "1 file cannot be read and is left out:\n  broken.jpg: " in shown
    assert main(base) == 0
    assert "21 photographs in the index; nothing new" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--query", "x", "--image", "y.png"], "two questions"),
        (["--image", "nowhere.png"], "missing image file"),
        (["--query", " "], "the query is empty"),
        (["--top", "0"], "at least 1"),
        (["--port", "70000"], "between 0 and 65535"),
        (["--no-update", "--index", "elsewhere"], "leave --no-update out"),
    ],
)
def test_unusable_questions_are_refused(
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["search", str(photographs), "--model", "scenes-teacher", "--index", str(tmp_path / "i"), "--quiet"]
    assert main([*base, *extra]) == 2
    assert said in capsys.readouterr().err
    assert main(["search", str(tmp_path / "no"), "--model", "scenes-teacher"]) == 2


def test_photographs_in_formats_not_decoded_are_counted_and_shown_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (80, 60), "red").save(tmp_path / "a.png")
    for number in range(12):
        (tmp_path / f"IMG_{number:02d}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "b.dng").write_bytes(b"II*\0")
    (tmp_path / "c.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no photograph")
    base = ["search", str(tmp_path), "--model", "scenes-teacher", "--query", "red"]
    for more in ([], ["--no-update"]):
        assert main([*base, *more]) == 0
        shown = capsys.readouterr().out
        assert shown.index("photographs searched in") < shown.index(
            "14 files cannot be read and are left out (1 empty image file, 13 format not decoded):\n"
            "  IMG_00.HEIC: format not decoded: HEIC, make a JPEG, PNG or WebP of it\n"
        )
        assert shown.endswith("  (and 4 more)\n")
    assert main([*base, "--json"]) == 0
    left_out = {one["file"]: one["reason"] for one in json.loads(capsys.readouterr().out)["left_out"]}
    assert len(left_out) == 14
    assert left_out["b.dng"].startswith("format not decoded: DNG")
    (tmp_path / "a.png").unlink()
    assert main(base) == 2
    assert "IMG_00.HEIC: format not decoded" in capsys.readouterr().err


def test_a_query_of_words_that_no_model_knows_is_not_answered(collection: Collection) -> None:
    for query in ("qwzx vfgh", "!?", "\N{SNOWMAN}"):
        with pytest.raises(InputError, match="no word that the model knows"):
            collection.ask_text(query)
    assert collection.ask_text("a red qwzx", 3)[0].hits


def test_the_answer_of_the_one_model_that_knows_no_word_is_withheld(
    collection: Collection, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(collection.sides[0].model, "knows", lambda text: False)
    student, teacher = collection.ask_text("a red circle", 3)
    assert student.hits == ()
    assert "withheld" in student.note
    assert len(teacher.hits) == 3
    print_answers([student, teacher], collection, "exact")
    assert "student: this model knows none of the words" in capsys.readouterr().out
    assert "this model knows none of the words" in render(collection, Question(text="x"), [student, teacher])


@pytest.mark.parametrize("kind", ["a file", "a dead link", "a name too long", "below a file"])
def test_an_index_that_cannot_be_made_is_one_sentence(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    place = tmp_path / ("x" * 300 if kind == "a name too long" else "place")
    if kind in ("a file", "below a file"):
        place.write_text("")
    if kind == "below a file":
        place = place / "index"
    if kind == "a dead link":
        place.symlink_to(tmp_path / "nowhere" / "at" / "all")
    assert main(["search", str(photographs), "--model", "scenes-teacher", "--index", str(place), "--query", "x"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert str(place)[:40] in shown.replace("\n", "")


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(tmp_path), "--model", "scenes-teacher", "--query", "x"]) == 2
    assert "holds no photograph that can be read" in capsys.readouterr().err


def test_both_models_answer_and_share(collection: Collection) -> None:
    student, teacher = collection.ask_text("a red circle", 5)
    assert (student.role, teacher.role) == ("student", "teacher")
    assert sum(hit.shared for hit in student.hits) == sum(hit.shared for hit in teacher.hits)
    files = {hit.path for hit in student.hits} & {hit.path for hit in teacher.hits}
    assert {hit.path for hit in student.hits if hit.shared} == files
    assert all(collection.paths[hit.number] == hit.path for hit in (*student.hits, *teacher.hits))
    assert len(collection.ask_text("a red circle", 500)[0].hits) == 21


def test_who_is_faster_is_only_said_when_the_rounds_agree() -> None:
    def answer(*rounds: float) -> Answer:
        return Answer("m", "student", 1.0, 1.0, (), "", rounds)

    assert times_as_fast(answer(1, 1, 2, 1, 1), answer(4, 4, 8, 5, 0.5)) == pytest.approx(4)
    assert times_as_fast(answer(4, 4, 4, 4, 4), answer(1, 1, 1, 1, 1)) == pytest.approx(0.25)
    assert times_as_fast(answer(1, 1, 1, 9, 9), answer(4, 4, 4, 4, 4)) is None
    assert times_as_fast(answer(), answer()) is None


def test_the_vectors_are_those_of_the_evaluation(collection: Collection, photographs: Path) -> None:
    """PNG files are decoded in full, so the index holds exactly what `clipdistill eval` computes."""
    from clipdistill.embed.encode import Encoder

    side = collection.sides[1]
    picture = decode((photographs / "scene-00.png").read_bytes())

    class One:
        name = "one"

        def __len__(self) -> int:
            return 1

        def key(self, i: int) -> str:
            return "scene-00.png"

        def image(self, i: int) -> Image.Image:
            return picture

    wanted = Encoder(side.model.model, progress=False).images(One())[0][0].numpy()
    stored = side.index.vector(side.index.entries["scene-00.png"].row)
    np.testing.assert_allclose(stored, wanted, atol=1e-5)


def test_large_photographs_are_decoded_smaller_with_nearly_the_same_vector(tmp_path: Path) -> None:
    """The shortcut of the JPEG decoder costs less than a thousandth of the cosine."""
    model = SearchModel("scenes-teacher", device="cpu")
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    small.resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=92)
    data = (tmp_path / "a.jpg").read_bytes()
    reduced = decode(data, at_least=model.at_least())
    assert reduced.width < 800
    assert float(model.image(reduced) @ model.image(decode(data))) > 0.999


@pytest.mark.slow
def test_the_page_is_served_by_the_command_until_it_is_stopped(photographs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clipdistill.cli", "search", str(photographs), "--model", "scenes-teacher"]
    command += ["--index", str(tmp_path / "i"), "--page", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("search page: "))
    url = line.split()[2]
    with urllib.request.urlopen(f"{url}?q=a+red+circle", timeout=60) as answer:
        assert b'class="hits"' in answer.read()
    process.terminate()
    assert process.wait(60) == 0
    time.sleep(0.1)
