"""Rows 1 to 12 and 29 of the table of faults (docs/reliability.md): what bad data does to a run."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clipdistill.data.images import decode
from clipdistill.data.loader import PairLoader
from clipdistill.data.open import open_pairs
from clipdistill.data.sampler import StepSampler
from clipdistill.errors import InputError
from clipdistill.models import load_model
from clipdistill.models.tokenizers import ClipBpeTokenizer
from tests.data.helpers import encoded, picture, sample_members, write_tar
from tests.data.test_images import bomb
from tests.reliability.support import Launcher, training

HTML = b"<!DOCTYPE html><html><body>404</body></html>"


def with_data(models: Path, out: Path, data: Path, *settings: str) -> list[str]:
    return [*training(models, out, *settings), "--data", str(data), "data.size=null"]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with everything that goes wrong in tars."""
    folder = tmp_path_factory.mktemp("damaged") / "tars"
    folder.mkdir()
    good = [member for number in range(14) for member in sample_members(number)]
    whole = encoded(picture(99, 200, 150))
    bad = [
        ("html.jpg", HTML), ("html.txt", b"a page"),
        ("cut.jpg", whole[: len(whole) // 2]), ("cut.txt", b"half a picture"),
        ("bomb.png", bomb(50_000, 50_000)), ("bomb.txt", b"a bomb"),
        ("../../escape.jpg", encoded(7)), ("../../escape.txt", b"outside"),
        ("000003.jpg", encoded(50)), ("000003.txt", b"a second of that name"),
    ]  # fmt: skip
    write_tar(folder / "0.tar", [*good, *bad])
    write_tar(folder / "1.tar", [member for number in range(20, 28) for member in sample_members(number)])
    shard = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(shard[: len(shard) // 2 + 700])
    (folder / "2.tar").write_bytes(HTML * 40)
    return folder


@pytest.fixture(scope="module")
def survived(launcher: Launcher, models: Path, damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over them that was allowed to skip a part."""
    out = tmp_path_factory.mktemp("survived") / "run"
    cache = {"CLIPDISTILL_CACHE": str(out.parent / "cache")}
    command = with_data(models, out, damaged, "data.bad_sample_budget=0.5")
    launcher.start(*command, environment=cache).finish()
    return out


def listed(run: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    return {row["key"]: row["reason"] for row in rows}


def test_row_01_corrupt_image(survived: Path, launcher: Launcher, models: Path, damaged: Path, tmp_path: Path) -> None:
    assert listed(survived)["0/html"].startswith("not an image: it is a web page")
    rows = [json.loads(line) for line in (survived / "bad_samples.jsonl").read_text().splitlines()]
    assert next(row for row in rows if row["key"] == "0/html")["shard"] == str(damaged / "0.tar")
    described = json.loads((survived / "run.json").read_text())
    assert described["status"] == "finished"
    assert described["bad_samples"] > 0
    cache = {"CLIPDISTILL_CACHE": str(tmp_path / "cache")}
    command = with_data(models, tmp_path / "run", damaged, "data.bad_sample_budget=0")
    said = launcher.start(*command, environment=cache).finish(3)
    assert "samples are bad" in said
    assert "the budget is 0.000%" in said


def test_row_02_truncated_image(survived: Path) -> None:
    assert listed(survived)["0/cut"].startswith("truncated image")


def test_row_03_truncated_shard(survived: Path, damaged: Path) -> None:
    reasons = Counter(reason.partition(":")[0] for reason in listed(survived).values())
    found = open_pairs(str(damaged))
    assert {key.split("/")[0] for key in (found.key(i) for i in range(len(found)))} == {"0", "1"}
    assert found.problems.total >= 2
    for reason in found.problems.counts:  # what opening found is in the run's list too
        assert reason in reasons


def test_row_04_duplicate_names(damaged: Path) -> None:
    found = open_pairs(str(damaged))
    keys = [found.key(i) for i in range(len(found))]
    assert len(set(keys)) == len(keys)
    again = keys.index("0/000003#2")
    assert found.captions(again) == ("a second of that name",)
    assert found.image_bytes(again) == encoded(50)


def table(path: Path, captions: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title"])
        for number, caption in enumerate(captions):
            (path.parent / f"{number}.jpg").write_bytes(encoded(number))
            writer.writerow([f"{number}.jpg", caption])
    return path


def test_row_05_missing_caption(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "t.csv", ["nan" if number % 3 == 0 else f"thing {number}" for number in range(24)])
    said = launcher.start(*with_data(models, tmp_path / "run", data)).finish(2)
    assert "t.csv" in said
    assert all(f" {row}" in said for row in (2, 5, 8, 11, 14))  # the first five rows, counted with the header
    skip = with_data(models, tmp_path / "run", data, "data.missing_captions=skip", "data.bad_sample_budget=0.5")
    launcher.start(*skip).finish()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_row_06_empty_caption(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [*sample_members(1), *sample_members(2, "   "), *sample_members(3)])
    found = open_pairs(str(tmp_path / "s.tar"))
    assert [found.key(i) for i in range(len(found))] == ["s/000001", "s/000003"]
    assert found.problems.counts["empty caption"] == 1


def test_row_07_overlong_caption(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    long = " ".join(["word"] * 200)
    data = table(tmp_path / "t.csv", [long if number % 2 else "short" for number in range(24)])
    said = launcher.start(*with_data(models, tmp_path / "run", data)).finish()
    rates = re.search(r"captions cut at the context length: student ([\d.]+)%, teacher ([\d.]+)%", said)
    assert rates is not None
    assert 0 < float(rates[1]) == float(rates[2]) < 100
    cut = json.loads((tmp_path / "run" / "run.json").read_text())["truncated"]
    assert cut["student"] == cut["teacher"] > 0
    for tokenizer in (load_model(models / "student").tokenizer, ClipBpeTokenizer()):
        row = tokenizer([long])[0]
        assert row[-1] == row.max()  # the end stays
        assert tokenizer.lengths([long])[0] > tokenizer.context_length


def test_row_08_any_text(tmp_path: Path) -> None:
    captions = ["plain", "e\u0301t\u00e9 \U0001f600", "\u05e9\u05dc\u05d5\u05dd", "a\x00b", "\udcff\udcfe broken"]
    write_tar(
        tmp_path / "s.tar",
        [
            member
            for number, caption in enumerate(captions)
            for member in (
                (f"{number}.jpg", encoded(number)),
                (f"{number}.txt", caption.encode("utf-8", "surrogateescape")),
            )
        ],
    )
    found = open_pairs(str(tmp_path / "s.tar"))
    assert [found.captions(i)[0] for i in range(len(found))] == [
        "plain", "\u00e9t\u00e9 \U0001f600", "\u05e9\u05dc\u05d5\u05dd", "ab", "broken",
    ]  # fmt: skip
    assert found.problems.total >= 2
    assert ClipBpeTokenizer()([found.captions(i)[0] for i in range(len(found))]).shape == (5, 77)


def test_row_09_bomb(survived: Path) -> None:
    assert listed(survived)["0/bomb"].startswith("too many pixels: ")


def test_row_10_modes(models: Path, tmp_path: Path) -> None:
    frames = [picture(1), picture(2)]
    kinds: list[tuple[str, bytes]] = [
        ("cmyk.jpg", encoded(picture(0).convert("CMYK"))),
        ("deep.png", encoded(Image.new("I;16", (9, 7), 40_000), "PNG")),
        ("palette.png", encoded(picture(0).convert("P"), "PNG")),
        ("alpha.png", encoded(picture(0).convert("RGBA"), "PNG")),
        ("moving.webp", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])),
        ("thin.png", encoded(Image.new("RGB", (1, 300)), "PNG")),
    ]
    members = [m for name, data in kinds for m in ((name, data), (f"{name.split('.')[0]}.txt", b"a picture"))]
    write_tar(tmp_path / "s.tar", members)
    student = load_model(models / "student")
    batches = list(PairLoader(open_pairs(str(tmp_path / "s.tar")), batch_size=6, student=student, steps=1))
    assert len(batches[0].keys) == 6
    assert not batches[0].problems
    assert batches[0].student_images.isfinite().all()
    assert decode(kinds[1][1]).getpixel((0, 0)) == (156, 156, 156)  # the high byte of 40000


def test_row_11_one_shard_more_workers_and_ranks_than_samples(models: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [member for number in range(3) for member in sample_members(number)])
    source, student = open_pairs(str(tmp_path / "s.tar")), load_model(models / "student")
    seen: list[str] = []
    for rank in (0, 1):
        settings: dict[str, Any] = {"batch_size": 8, "student": student, "rank": rank, "world": 2, "steps": 2}
        batches = list(PairLoader(source, **settings, workers=4))
        assert len(batches) == 2
        seen += batches[0].keys
    assert sorted(seen) == ["s/000000", "s/000001", "s/000002"]
    with pytest.raises(InputError, match="4 processes cannot share batches of 3 samples"):
        PairLoader(source, batch_size=8, student=student, rank=0, world=4, steps=1)


def test_row_12_last_batch() -> None:
    for samples, batch, world in ((101, 10, 3), (17, 5, 2), (8, 8, 4), (9, 20, 2)):
        shares = [StepSampler(samples, batch, 0, rank, world) for rank in range(world)]
        assert len({share.steps_per_epoch for share in shares}) == 1
        epoch = [i for step in range(shares[0].steps_per_epoch) for share in shares for i in share.indices(step)]
        assert len(epoch) == len(set(epoch)) == samples - shares[0].dropped_per_epoch
        assert shares[0].dropped_per_epoch < batch


def test_row_26_separate_pipelines(models: Path, tmp_path: Path) -> None:
    """Teacher and student of other sizes, statistics and tokenizers are fed each in its own way."""
    from clipdistill.models import save_model
    from tests.cache.support import tiny_model

    teacher = tiny_model(seed=3, image_size=48, words=90)
    half = teacher.image.model_copy(update={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
    teacher.image = half
    save_model(teacher, tmp_path / "siglip-like")
    teacher, student = load_model(tmp_path / "siglip-like", teacher=True), load_model(models / "student")
    source = open_pairs("scenes:train?size=8")
    batch = next(iter(PairLoader(source, batch_size=8, student=student, teacher=teacher, steps=1)))
    assert batch.teacher_images is not None
    assert batch.student_images.shape[2:] == (32, 32)
    assert batch.teacher_images.shape[2:] == (48, 48)
    assert not torch.equal(batch.student_tokens, batch.teacher_tokens)  # type: ignore[arg-type]
    # back to pixels with each model's own statistics, both show the same pictures
    means = [
        (images * torch.tensor(spec.std)[:, None, None] + torch.tensor(spec.mean)[:, None, None]).mean((2, 3))
        for images, spec in ((batch.student_images, student.image), (batch.teacher_images, teacher.image))
    ]
    torch.testing.assert_close(means[0], means[1], atol=0.02, rtol=0)


def test_row_29_path_traversal(survived: Path, damaged: Path) -> None:
    found = open_pairs(str(damaged))
    assert any("escape" in found.key(i) for i in range(len(found)))  # it was read, by its place in the archive
    assert not list(damaged.parent.parent.rglob("escape*"))
    assert not list(survived.parent.rglob("escape*"))
