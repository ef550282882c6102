"""Rows 14, 19, 21 to 25, 27, 28 and 30 to 36 of the table of faults (docs/reliability.md)."""

from __future__ import annotations

import json
import math
import pickle
import re
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import clipdistill as cd
from clipdistill.errors import InputError
from clipdistill.models import build_student, load_model, save_model
from clipdistill.runtime.files import CHECKSUM
from tests.bench.synthetic import Clock
from tests.data.helpers import encoded
from tests.reliability.support import STEPS, Launcher, lines, newest_step, ranks, require_same_run, training
from tests.reliability.test_rows_data import table, with_data


def test_row_14_logit_scale_and_collapse(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["train.max_logit_scale=14.4", "train.learning_rate=0.05", "train.evaluate_every=1"]
    said = launcher.start(*training(models, out, *settings)).finish()
    scales = [line["logit_scale"] for line in lines(out / "log.jsonl")]
    assert max(scales) <= 14.4 * (1 + 1e-6)
    assert "warning: R@1 has been at chance (12.50%) for 3 evaluations" in said
    assert "limit 14.4" in said


def test_row_19_changed_configuration(launcher: Launcher, models: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher.start(*training(models, out), fault="stop_at", step=2).finish(75)
    said = launcher.start(*training(models, out, "train.learning_rate=0.5", "train.batch_size=4")).finish(2)
    assert "train.batch_size: 8 -> 4; train.learning_rate: 0.001 -> 0.5" in said
    assert newest_step(out) == 3
    # what does not change what is learned may change; so may the rest, when asked for
    free = ["train.log_every=2", "train.keep_checkpoints=1", "train.workers=1", "train.rank_timeout=60"]
    said = launcher.start(*training(models, out, *free), fault="stop_at", step=3).finish(75)
    assert "from step 3" in said
    launcher.start(*training(models, out)).finish()
    require_same_run(undisturbed, out)
    other = launcher.start(*training(models, out, "train.steps=8"), "--allow-changes").finish()
    assert "from step 6" in other


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table(tmp_path_factory.mktemp("pairs") / "t.csv", [f"picture number {number}" for number in range(16)])


@pytest.fixture(scope="module")
def cache(launcher: Launcher, models: Path, pairs: Path) -> Path:
    """A cache of the tiny teacher over these pairs, in two blocks."""
    out = pairs.parent / "cache"
    fill = ["cache", "--teacher", models / "teacher", "--data", pairs, "--out", out, "--device", "cpu", "--block", 8]
    launcher.start(*fill, "--quiet").finish()
    return out


def cached(models: Path, out: Path, data: Path, cache: Path) -> list[str]:
    return [*with_data(models, out, data, "train.steps=2"), "--teacher", f"cache:{cache}"]


def test_row_21_cache_of_other_data(launcher: Launcher, models: Path, pairs: Path, cache: Path, tmp_path: Path) -> None:
    header, *rows = pairs.read_text().splitlines()
    shuffled = pairs.with_name("shuffled.csv")
    shuffled.write_text("\n".join([header, rows[1], rows[0], *rows[2:]]) + "\n")
    said = launcher.start(*cached(models, tmp_path / "run", shuffled, cache)).finish(2)
    assert "data order: the keys are the same in another order" in said
    shuffled.write_text("\n".join([header, *rows[:-1]]) + "\n")
    said = launcher.start(*cached(models, tmp_path / "run", shuffled, cache)).finish(2)
    assert "data keys: the cache has 1 that the data has not" in said


def test_row_22_cache_of_another_teacher(
    launcher: Launcher, models: Path, pairs: Path, cache: Path, tmp_path: Path
) -> None:
    described = cache / "manifest.json"
    values = described.read_text()
    try:
        for before, after, named in (
            ('"precision": "fp32"', '"precision": "bf16"', "precision"),
            ('"interpolation": "bicubic"', '"interpolation": "bilinear"', "transform"),
            ('"dtype": "fp16"', '"dtype": "bf16"', "dtype"),
        ):
            assert before in values
            edited = json.loads(values.replace(before, after))
            del edited[CHECKSUM]
            described.write_text(json.dumps(edited))
            said = launcher.start(*cached(models, tmp_path / "run", pairs, cache)).finish(2)
            assert named in said
    finally:
        described.write_text(values)


def test_row_23_flipped_byte(launcher: Launcher, models: Path, pairs: Path, cache: Path, tmp_path: Path) -> None:
    block = cache / "teacher-0" / "000001.safetensors"
    content = block.read_bytes()
    damaged = bytearray(content)
    damaged[-20] ^= 4
    block.write_bytes(bytes(damaged))
    said = launcher.start("cache", "verify", cache).finish(1)
    assert "000001.safetensors: damaged block (its checksum does not match" in said
    block.unlink()  # as the sentence says: delete it and fill again
    said = launcher.start(*cached(models, tmp_path / "run", pairs, cache)).finish(2)
    assert "1 of 2 blocks are not filled" in said
    fill = ["cache", "--teacher", models / "teacher", "--data", pairs, "--out", cache, "--device", "cpu", "--block", 8]
    launcher.start(*fill, "--quiet").finish()
    assert block.read_bytes() == content
    launcher.start("cache", "verify", cache).finish(0)


def test_row_24_views(launcher: Launcher, models: Path, pairs: Path, cache: Path, tmp_path: Path) -> None:
    said = launcher.start(*cached(models, tmp_path / "run", pairs, cache)).finish()
    assert "embeddings of" in said
    unwrapped = " ".join(said.split())  # the terminal breaks lines where the path of the models ends them
    assert re.search(r"computed again, least cosine (1\.0000|0\.999)", unwrapped)
    live = launcher.start(*cached(models, tmp_path / "live", pairs, cache), "train.views=live").finish(2)
    assert "need a live teacher" in live
    # a picture that changed after the fill is noticed before the first step
    (pairs.parent / "0.jpg").write_bytes(encoded(77))
    try:
        said = launcher.start(*cached(models, tmp_path / "changed", pairs, cache)).finish(2)
    finally:
        (pairs.parent / "0.jpg").write_bytes(encoded(0))
    assert "now gives another embedding for the image of" in said


def test_row_25_unequal_dimensions_on_two_ranks(
    launcher: Launcher, models: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Projections are the run's: the same on every rank, trained, and in the checkpoint."""
    for child in ranks(launcher, 2, *training(models, tmp_path / "two")):
        child.finish()
    last = f"checkpoints/step-{STEPS:08d}/objective.safetensors"
    one, two = (load_file(folder / last) for folder in (undisturbed, tmp_path / "two"))
    assert one["image_projection.weight"].shape == (32, 16)
    first = load_file(undisturbed / last.replace(f"{STEPS:08d}", f"{STEPS - 1:08d}"))
    assert not torch.equal(first["image_projection.weight"], one["image_projection.weight"])
    for name in one:  # the ranks' sums round differently, and Adam turns signs of rounding into steps of 0.001
        torch.testing.assert_close(one[name], two[name], atol=5e-3, rtol=0)


def test_row_27_activation(models: Path, tmp_path: Path) -> None:
    model = load_model(models / "student")
    save_model(model, tmp_path / "m")
    described = json.loads((tmp_path / "m" / "model.json").read_text())
    assert described["activation"] == "gelu"
    described["architecture"]["quick_gelu"] = True
    del described[CHECKSUM]
    (tmp_path / "m" / "model.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="'gelu' contradicts the architecture"):
        load_model(tmp_path / "m")


class Touch:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_row_28_malicious_checkpoint(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    proof, path = tmp_path / "executed", tmp_path / "evil.pt"
    torch.save({"state_dict": {"x": torch.ones(2)}, "extra": Touch(proof)}, path)
    command = training(models, tmp_path / "run")
    command[command.index("--student-weights") + 1] = str(path)
    said = launcher.start(*command).finish(2)
    assert "evil.pt: " in said
    assert not proof.exists()
    pickle.loads(pickle.dumps(Touch(proof)))  # it would have been
    assert proof.exists()


def test_row_30_wrong_split() -> None:
    from tests.evaluate.conftest import ColourPairs, colour_model

    source = ColourPairs(name="dataset_flickr8k/val")
    scores = cd.evaluate(colour_model(), source, progress=False, intervals=False)
    assert "NOT the published set: 10 images and 20 captions of 1,000 and 5,000" in scores.protocols()[0].label()
    with pytest.raises(InputError, match="flickr8k/val holds 10 images"):
        cd.evaluate(colour_model(), source, progress=False, strict_counts=True)


def test_row_31_ties() -> None:
    found = cd.retrieval(torch.ones(20, 4), torch.ones(100, 4), torch.arange(20).repeat_interleave(5))
    assert found["t2i_R@1"] == pytest.approx(1 / 20)
    assert found["ties"] > 0
    doubled = torch.nn.functional.normalize(torch.randn(10, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    found = cd.retrieval(doubled.repeat(2, 1), doubled.repeat(2, 1), torch.arange(20))
    assert found["t2i_R@1"] == pytest.approx(0.5)  # each picture is there twice: a coin decides


def test_row_32_out_of_memory(launcher: Launcher, models: Path, undisturbed: Path, tmp_path: Path) -> None:
    """On this machine the allocator is made to fail; on a GPU it does so by itself."""
    out = tmp_path / "run"
    said = launcher.start(*training(models, out), fault="no_memory", step=3).finish(1)
    assert "memory: about" in said  # the estimate, before step 0
    assert "out of memory while training at step 3 with 8 pairs a rank at a time" in said
    assert "train.micro_batch=4 needs about half" in said
    assert newest_step(out) == 3
    launcher.start(*training(models, out)).finish()  # micro-batches may be changed; here they need not be
    require_same_run(undisturbed, out)


def test_row_33_throttling() -> None:
    from clipdistill.bench.timing import TimedTask, measure

    clock = Clock()
    task = TimedTask("a", lambda: clock.spend(0.01 * (1 + clock.now / 5)), 4)
    found = measure(
        [task],
        seconds=1.0,
        rounds=10,
        clock=clock,
        max_reruns=1,
        probe=lambda: clock.spend(0.001 * (1 + clock.now / 5)),
    )
    assert found.reruns == 1
    assert any(warning.startswith("throttling: the machine itself became") for warning in found.warnings)


def test_row_36_no_network(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    """No socket leads anywhere: local files are enough, and a name that needs the network is one sentence."""
    out = tmp_path / "run"
    launcher.start(*training(models, out, "train.steps=2"), fault="no_network").finish()
    for teacher in ("hf:someone/clip", "ViT-B-16/laion400m_e32"):
        command = training(models, tmp_path / "other")
        command[command.index("--teacher") + 1] = teacher
        said = launcher.start(*command, fault="no_network").finish(2)
        assert len(said.strip().splitlines()) == 1, said
        assert "network" in said or "reached" in said or "offline" in said.lower()
    assert socket.socket().family  # this process still has one
    assert math.isfinite(lines(out / "log.jsonl")[-1]["total"])


def test_models_of_other_formats_are_refused(models: Path, tmp_path: Path) -> None:
    """Row 27's neighbour: a description of a later version is not guessed at."""
    save_model(build_student(load_model(models / "student").architecture, seed=0,
                             tokenizer=load_model(models / "student").tokenizer), tmp_path / "m")  # fmt: skip
    path = tmp_path / "m" / "model.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2', 1).replace(f'"{CHECKSUM}"', '"without"'))
    with pytest.raises(InputError, match="format 2 is not known here"):
        load_model(tmp_path / "m")
