"""The meta-teacher as a whole: text tokens, folder, training, its use as a teacher, what it measures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import clipdistill as cd
from clipdistill.data.open import open_pairs
from clipdistill.errors import InputError, Preempted
from clipdistill.models import build_student, load_model
from clipdistill.regions.command import add_arguments, run
from clipdistill.regions.measure import matrix_scores, measure
from clipdistill.regions.meta_teacher import MetaTeacher, read_meta_teacher, region_teacher_folder
from clipdistill.regions.retention import before_after
from clipdistill.regions.teacher import RegionTeacher
from clipdistill.regions.training import RegionTeaching
from clipdistill.runs.folder import read_rows as read_lines
from clipdistill.train.config import RunConfig, resolve
from clipdistill.train.opening import opened
from clipdistill.train.region_config import MetaTeacherConfig
from clipdistill.train.replay import replay
from clipdistill.train.run import distill
from clipdistill.train.setup import build
from clipdistill.train.stages import distill_stages, resolve_stages

CPU = torch.device("cpu")


def settings(out: Path, recipe: str, *assignments: str) -> RunConfig:
    return resolve(recipe, {"out": str(out)}, size="debug", assignments=assignments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small trained teachers, with and without the caption."""
    out = tmp_path_factory.mktemp("teachers")
    for name, recipe in (("caption", "dclip-teacher"), ("free", "dclip-teacher-caption-free")):
        distill(settings(out / name, recipe, f"regions.store={out / 'store'}"), quiet=True)
    return out


def test_token_states_are_the_hidden_states_through_the_projection() -> None:
    for name in ("scenes-teacher", "custom"):
        if name == "custom":  # the other class of open_clip's models, with its text tower in a part of its own
            plain = load_model("scenes-teacher")
            clip = build_student({**plain.architecture, "custom_text": True}, seed=0, tokenizer=plain.tokenizer)
        else:
            clip = load_model(name, teacher=True)
        clip.module.eval()
        tokens = clip.tokenizer(["a red ball", "two small blue cubes on a table"])
        teacher = MetaTeacher.start(clip, MetaTeacherConfig(heads=4))
        with torch.no_grad():
            sentence, states, mask = teacher.text(tokens)
            expected = clip.module.encode_text(tokens)
        torch.testing.assert_close(sentence, expected)
        ends = tokens.argmax(1).tolist()
        # the sentence embedding is the state of the end token: the same path to the bit of rounding
        for row, end in enumerate(ends):
            torch.testing.assert_close(states[row, end], expected[row], rtol=1e-5, atol=1e-5)
            assert mask[row].nonzero().flatten().tolist() == list(range(1, end))


def test_training_writes_an_ordinary_run_folder(folder: Path) -> None:
    described = json.loads((folder / "caption" / "run.json").read_text())
    assert described["status"] == "finished"
    assert described["kind"] == "region teacher"
    assert described["steps"] == 3
    assert described["samples_seen"] == 48
    lines = read_lines(folder / "caption" / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    measured = json.loads((folder / "caption" / "measured.json").read_text())["scores"]
    assert {"clip", "own caption", "other caption", "every pair"} <= set(measured)
    assert set(json.loads((folder / "free" / "measured.json").read_text())["scores"]) == {
        "clip",
        "mean of regions",
        "regions alone",
    }
    assert distill(settings(folder / "caption", "dclip-teacher", f"regions.store={folder / 'store'}")).steps == 3


def test_only_the_network_trains(folder: Path) -> None:
    teacher = read_meta_teacher(folder / "caption" / "student")
    frozen = load_model("scenes-teacher").module.state_dict()
    assert all(torch.equal(frozen[name], value) for name, value in teacher.clip.module.state_dict().items())
    fresh = MetaTeacher.start(load_model("scenes-teacher"), teacher.config, seed=0).network.state_dict()
    changed = [name for name, value in teacher.network.state_dict().items() if not torch.equal(value, fresh[name])]
    assert {"text_to_image.in_proj_weight", "image_to_text.in_proj_weight", "norm_text.weight"} <= set(changed)


def test_steps_are_those_of_a_plain_loop(folder: Path) -> None:
    """The first logged loss, from the formula of InfoNCE at temperature 0.05."""
    config = settings(folder / "caption", "dclip-teacher", f"regions.store={folder / 'store'}")
    one = RegionTeaching(config, CPU)
    indices, captions = one.batch(0)
    assert len(set(indices)) == 16
    assert all(caption in one.source.captions(index) for index, caption in zip(indices, captions, strict=True))
    with torch.no_grad():
        sentence, states, mask = one.teacher.text(one.teacher.clip.tokenizer(captions))
        image = one.teacher.image(one.store.read(indices), states, mask)
    logits = F.normalize(image, dim=1) @ F.normalize(sentence, dim=1).T / 0.05
    labels = torch.arange(16)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    first = read_lines(folder / "caption" / "log.jsonl")[0]
    assert first["total"] == pytest.approx(float(expected), rel=1e-5)
    assert first["logit_scale"] == 20


def test_an_interrupted_training_ends_in_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RegionTeaching.after_step
    steps: list[int] = []

    def stopping(self: RegionTeaching, updated: bool) -> None:
        original(self, updated)
        steps.append(1)
        if len(steps) == 3:
            raise Preempted("as if by a signal")

    options = (f"regions.store={folder / 'store'}", "train.checkpoint_every=1")
    with monkeypatch.context() as patch:
        patch.setattr(RegionTeaching, "after_step", stopping)
        with pytest.raises(Preempted):
            distill(settings(tmp_path / "parts", "dclip-teacher", *options), quiet=True)
    assert (tmp_path / "parts" / "checkpoints" / "step-00000002" / "network.safetensors").exists()
    distill(settings(tmp_path / "parts", "dclip-teacher", *options), quiet=True)
    one, two = (
        load_file(run / "student" / "meta_teacher.safetensors") for run in (folder / "caption", tmp_path / "parts")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [
        [line["total"] for line in read_lines(run / "log.jsonl")] for run in (folder / "caption", tmp_path / "parts")
    ]
    assert losses[0] == losses[1]


def test_the_curve_and_the_identity_of_a_region_teacher(folder: Path, tmp_path: Path) -> None:
    shared = f"regions.store={folder / 'store'}"
    out = tmp_path / "curve"
    distill(settings(out, "dclip-teacher-caption-free", shared, "train.evaluate_every=2"), quiet=True)
    points = read_lines(out / "eval.jsonl")
    assert [point["step"] for point in points] == [2, 3]
    assert all(0 <= point["scores"]["t2i_R@1"] <= 1 and point["images"] == 32 for point in points)
    # evaluating changes nothing in what is learned
    one, two = (load_file(run / "student" / "meta_teacher.safetensors") for run in (folder / "free", out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    identity = json.loads((out / "identity.json").read_text())
    assert set(identity["parts"]) == {"training data", "training images", "teacher", "regions", "starting student"}


def test_a_training_that_an_older_version_stopped_is_refused_in_one_sentence(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "dclip-teacher")
    with opened(config, allow_changes=False):
        (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"old")
    with pytest.raises(InputError, match="an older version stopped in the middle"):
        distill(config, quiet=True)


def test_a_poisoned_step_of_a_region_teacher_is_replayed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RegionTeaching.gradients

    def poisoned(self: RegionTeaching, step: int, batch: Any) -> Any:
        output, norm = original(self, step, batch)
        return output, float("nan") if step == 1 else norm

    config = settings(tmp_path / "run", "dclip-teacher", f"regions.store={folder / 'store'}")
    with monkeypatch.context() as patch:
        patch.setattr(RegionTeaching, "gradients", poisoned)
        run = distill(config, quiet=True)
    assert json.loads((run.folder / "run.json").read_text())["skipped_steps"] == 1
    found = replay(run.folder)
    assert found.step == 1
    assert found.first is None
    assert {"weights", "image embeddings", "term task", "gradients"} <= {f.what for f in found.findings}


def test_a_folder_comes_back_to_the_bit_and_refuses_damage(folder: Path, tmp_path: Path) -> None:
    teacher = read_meta_teacher(folder / "free" / "student")
    teacher.save(tmp_path / "copy")
    again = read_meta_teacher(tmp_path / "copy")
    assert again.config == teacher.config
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name])
    assert region_teacher_folder(str(folder / "free")) == folder / "free" / "student"
    assert region_teacher_folder("scenes-teacher") is None
    weights = tmp_path / "copy" / "meta_teacher.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"not what meta_teacher\.json recorded"):
        read_meta_teacher(tmp_path / "copy")
    with pytest.raises(InputError, match="needs boxes of every image"):
        load_model(folder / "free")


@pytest.mark.parametrize("name", ["meta_teacher.json", "meta_teacher.safetensors", "clip/model.json"])
@pytest.mark.parametrize(
    "content", [b"", bytes(64), b"[]", b"null", b'{"format": 1}', b"\xff\xfe", b'{"format": 1, "settings": 3}']
)
def test_a_damaged_teacher_is_one_sentence(folder: Path, tmp_path: Path, name: str, content: bytes) -> None:
    shutil.copytree(folder / "free" / "student", tmp_path / "copy")
    (tmp_path / "copy" / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_meta_teacher(tmp_path / "copy")
    assert "\n" not in str(caught.value)


def test_as_the_teacher_of_a_run(folder: Path, tmp_path: Path) -> None:
    config = settings(
        tmp_path / "run",
        "dclip",
        f"teacher={folder / 'caption'}",
        "student=inherit:all",
        "regions.boxes=grid:1+2",
        f"regions.store={folder / 'store'}",
    )
    setup = build(config, CPU)
    teacher = setup.teacher
    assert isinstance(teacher, RegionTeacher)
    assert teacher.notes[-1].startswith("the image embeddings of this teacher contain the caption")
    batch = next(iter(setup.loader(0)))
    found = teacher(batch)
    own = read_meta_teacher(folder / "caption" / "student")
    sentence, states, mask = own.text(own.clip.tokenizer(batch.captions))
    regions = teacher.store.read(batch.indices.tolist())
    torch.testing.assert_close(found.image, own.image(regions, states, mask))
    torch.testing.assert_close(found.text, sentence)
    assert found.logit_scale == 20
    # the student starts as the teacher's CLIP, and only its image tower trains
    start = load_model("scenes-teacher").module.state_dict()
    assert all(torch.equal(start[name], value) for name, value in setup.student.module.state_dict().items())
    # the multiplier is fixed at 20, so it does not train either
    trained = {name for name, p in setup.student.module.named_parameters() if p.requires_grad}
    assert trained == {name for name in start if name.startswith("visual.")}
    finished = distill(config, quiet=True)
    after = load_model(finished.folder).module.state_dict()
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert changed
    assert changed <= {name for name in start if name.startswith("visual.")}
    assert finished.scores is not None
    assert finished.scores.models() == ["student", "teacher"]


def test_what_the_released_code_trains(folder: Path, tmp_path: Path) -> None:
    config = settings(
        tmp_path / "run",
        "dclip-released",
        f"teacher={folder / 'free'}",
        "student=inherit:all",
        "regions.boxes=grid:1+2",
        f"regions.store={folder / 'store'}",
    )
    module = build(config, CPU).student.module
    image = {name for name, p in module.visual.named_parameters() if p.requires_grad}
    assert image == {"proj"} | {
        f"transformer.resblocks.{layer}.attn.{part}"
        for layer in range(4)
        for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }
    text = [p for name, p in module.named_parameters() if not name.startswith("visual.") and name != "logit_scale"]
    assert all(p.requires_grad for p in text)


@pytest.mark.slow
def test_teacher_and_student_by_one_command(tmp_path: Path) -> None:
    configs = resolve_stages("dclip-stages", {"out": str(tmp_path / "run")}, size="debug")
    assert [config.meta_teacher is not None for config in configs] == [True, False]
    teacher, student = distill_stages(configs, quiet=True)
    assert region_teacher_folder(str(teacher.folder)) == teacher.student
    assert student.scores is not None
    assert "stage" in (tmp_path / "run" / "report.html").read_text()


def test_the_leak_is_measured(folder: Path) -> None:
    """A network that hands the caption through finds its own caption, and the wrong one when given that."""
    source = open_pairs("scenes:val?size=24")
    free = read_meta_teacher(folder / "free" / "student")
    config = settings(folder / "x", "dclip-teacher", f"regions.store={folder / 'store'}")
    assert config.regions is not None
    from clipdistill.regions.teacher import open_store

    teacher = read_meta_teacher(folder / "caption" / "student")
    store = open_store(config.regions, source, teacher.clip, teacher.config, folder, CPU)

    class Leaking(MetaTeacher):
        def image(self, regions: Any, states: Any = None, mask: Any = None) -> Any:
            return (states * mask[..., None]).sum(1)

    leaking = Leaking("leak", teacher.clip, teacher.network)
    found = measure(leaking, source, store, pairs=10).scores
    assert found["wrong caption: the image"]["i2t_R@1"] < found["wrong caption: the caption"]["i2t_R@1"]
    assert found["own caption"]["t2i_R@1"] == pytest.approx(found["wrong caption: the caption"]["t2i_R@1"])
    assert found["every pair"]["i2t_R@1"] < 0.5  # every image claims every caption alike
    alone = measure(free, source, store)
    assert set(alone.scores) == {"clip", "mean of regions", "regions alone"}
    assert "regions alone" in [row[0] for row in alone.table().rows]


def test_scores_of_a_matrix_by_hand() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 0.0], [1.0, 2.0, 0.0]])
    found = matrix_scores(scores)
    # rows: first; tied with one; last. columns: behind 5; first; behind 2 and tied with one
    assert found["i2t_R@1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["i2t_MRR"] == pytest.approx((1 + 0.75 + 1 / 3) / 3)
    assert found["t2i_R@1"] == pytest.approx((0 + 1 + 0) / 3)
    assert found["t2i_MRR"] == pytest.approx((0.5 + 1 + (1 / 2 + 1 / 3) / 2) / 3)


@pytest.mark.parametrize("labelled", [(), pytest.param(("scenes:zeroshot",), marks=pytest.mark.slow)])
def test_before_and_after(labelled: tuple[str, ...]) -> None:
    untrained = build_student("scenes-student", seed=0, tokenizer=load_model("scenes-teacher").tokenizer)
    changes = before_after("scenes-teacher", untrained, ["scenes:val?size=16", *labelled])
    scores = changes.scores
    by_name = {change.metric: change for change in changes}
    assert {"i2t_R@1", "t2i_MRR", "i2t_mAP@10"} <= set(by_name)
    for metric in ("t2i_R@1", *(("top1",) if labelled else ())):
        change = by_name[metric]
        assert change.before == pytest.approx(scores.value(metric, "teacher"))
        assert change.after == pytest.approx(scores.value(metric, "student"))
        assert change.difference[0] == pytest.approx(change.after - change.before)
        assert change.kept is not None
        assert change.kept[0] == pytest.approx(change.after / change.before)
        assert change.difference[2] < 0  # an untrained model is worse, and the interval says so
    assert repr(changes).count(" [-") == len(changes)
    assert "<table>" in changes._repr_html_()


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("regions=null",), "name the boxes of the images"),
        (("teacher=null",), "name the CLIP to freeze"),
        (("objective.weights.crd=1",), "without a teacher of its own"),
        (("meta_teacher.heads=7",), "7 heads do not divide"),
        (("meta_teacher.image_side=captions",), "image_side"),
    ],
)
def test_refused_trainings(tmp_path: Path, assignments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        distill(settings(tmp_path / "run", "dclip-teacher", *assignments), quiet=True)


def test_a_teacher_needs_boxes_and_stands_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs boxes of the training images"):
        build(settings(tmp_path / "run", "dclip", f"teacher={folder / 'free'}"), CPU)
    both = f"teacher={folder / 'free'},scenes-teacher"  # several teachers are for the term reinforced
    with pytest.raises(InputError, match="stands alone"):
        build(settings(tmp_path / "run", "mobileclip", both, "regions.boxes=grid"), CPU)


def test_from_python(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"store": tmp_path / "store", "device": "cpu", "quiet": True}
    found = cd.region_boxes("grid:2", {"path": "scenes", "size": 8}, tmp_path / "boxes", device="cpu", quiet=True)
    assert repr(found) == f"32 boxes of 8 images: grid:2 ({tmp_path / 'boxes'})"
    data = "scenes:train?size=8"
    assert "40 regions of 8 images, 5.0 each" in repr(cd.region_embeddings(folder / "free", data, found.path, **told))
    scores = cd.region_scores(folder / "caption", "scenes?size=8", "grid:2", pairs=4, **told)
    assert scores.images["every pair"] == 4
    assert re.search(r"own caption +8 +\d+\.\d", repr(scores))
    assert "<table>" in scores._repr_html_()
    assert "on scenes/val" in repr(scores)
    written = cd.region_vectors(folder / "free", data, found.path, tmp_path / "vectors.parquet", **told)
    assert written.images == 8
    assert f"'cache:{written.path}'" in repr(written)
    assert capsys.readouterr() == ("", "")


def command(*words: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(list(words)))


def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", "scenes:train?size=64")
    boxes = tmp_path / "boxes"
    command("boxes", "--detector", "grid:2", *data, "--out", str(boxes))
    assert "boxes of 64 images: grid:2" in capsys.readouterr().out
    teacher = str(folder / "free")
    shared = ("--boxes", str(boxes), "--store", str(tmp_path / "store"))
    command("embed", teacher, *data, *shared)
    assert "320 regions of 64 images, 5.0 each" in capsys.readouterr().out
    out = tmp_path / "teacher.parquet"
    command("export", teacher, *data, *shared, "--out", str(out))
    with pytest.raises(InputError, match="depends on the caption"):
        command("export", str(folder / "caption"), *data, *shared, "--out", str(out))
    config = settings(tmp_path / "run", "dclip", f"teacher=cache:{out}", "student=scenes-teacher")
    cached = build(config, CPU)
    assert cached.teacher is not None
    batch = next(iter(cached.loader(0)))
    found = cached.teacher(batch)
    live = read_meta_teacher(folder / "free" / "student")
    from clipdistill.regions.store import RegionStore

    stores = map(RegionStore, sorted((tmp_path / "store").glob("regions-*")))
    store = next(store for store in stores if store.manifest.whole_image == "always")
    with torch.no_grad():
        expected = F.normalize(live.image(store.read(batch.indices.tolist())), dim=1)
        text = F.normalize(live.text(live.clip.tokenizer(batch.captions))[0], dim=1)
    torch.testing.assert_close(found.image, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.text, text, rtol=1e-4, atol=1e-5)
    for words, message in (
        (("measure", "scenes-teacher", *data, *shared), "is no region teacher"),
        (("boxes", *data), "give --detector"),
        (("compare", teacher), "name two models"),
    ):
        with pytest.raises(InputError, match=message):
            command(*words)
