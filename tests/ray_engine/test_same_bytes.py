"""What goes through Ray's workers is what this process computes: the jobs run here, without Ray, in another order."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

import clipdistill as cd
from clipdistill import errors
from clipdistill.cache.fill import fill
from clipdistill.cli import main
from clipdistill.embed.encode import encode_pairs
from clipdistill.errors import InputError
from clipdistill.ray_engine import cluster, encoder, filling, names
from clipdistill.scenes.pairs import open_scenes
from clipdistill.vectors import job
from tests.cache.support import cache_config, saved_teacher, scenes
from tests.evaluate.conftest import ColourPairs, model

__all__ = ["model"]


class InProcess:
    """A cluster whose workers are this process; the last task is finished first."""

    device = "cpu"

    def __init__(self, workers: int = 2) -> None:
        self.workers, self.tasks, self.dies_after = workers, [], None

    def spread(self, work, tasks):
        self.tasks.append(tasks)
        work = dataclasses.replace(work, source=pickle.loads(pickle.dumps(work.source)))
        work.start("cpu")
        for done, number in enumerate(reversed(range(len(tasks)))):
            if done == self.dies_after:
                raise errors.ClipdistillError("the driver was killed")
            tensors, notes = work(json.loads(json.dumps(tasks[number])))
            yield number, load(save(tensors)), json.loads(json.dumps(notes))


@pytest.fixture
def workers(monkeypatch):
    found = InProcess()
    monkeypatch.setattr(names, "find_spec", lambda name: True)
    for module in (encoder, filling):
        monkeypatch.setattr(module, "connect", lambda *_: found)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return saved_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


def files(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: content for name, content in found.items() if not name.startswith("locks")}


@pytest.mark.parametrize("settings", [{}, {"views": 2, "dtype": "int8", "captions": "first"}])
def test_a_cache_holds_the_same_bytes(settings, workers, teacher, tmp_path):
    here = fill(cache_config(tmp_path / "here", teacher, 20, **settings))
    there = fill(cache_config(tmp_path / "there", teacher, 20, engine="ray", **settings))
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert [task["indices"] for task in workers.tasks[0]] == [
        {"first": 0, "stop": 8}, {"first": 8, "stop": 16}, {"first": 16, "stop": 20},
    ]  # fmt: skip
    assert (there.samples, there.bad, there.truncated) == (here.samples, here.bad, here.truncated)


def test_added_captions_and_stored_views_go_with_the_blocks(workers, teacher, tmp_path):
    added = tmp_path / "added.json"
    added.write_text(json.dumps({scenes(20).key(i): [f"added {i}", "and another"] for i in range(20)}))
    for name, engine in (("here", "torch"), ("there", "ray")):
        folder = tmp_path / name
        fill(cache_config(folder, teacher, 20, views=1, engine=engine))
        fill(cache_config(folder, teacher, 20, views=1, engine=engine, synthetic=added))
        (folder / "teacher-0" / "pairs" / "000001.safetensors").unlink(missing_ok=True)
        lost = sorted(path for path in folder.rglob("*000001.safetensors") if "views" not in path.as_posix())
        assert lost
        for path in lost:
            path.unlink()
        fill(cache_config(folder, teacher, 20, views=1, engine=engine))
    assert workers.tasks[-1][0]["views"]
    assert files(tmp_path / "here") == files(tmp_path / "there")


def test_a_killed_driver_goes_on_and_unreadable_pictures_are_counted_the_same(workers, teacher, tmp_path):
    source, bad = scenes(20), (3, 9, 10)
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(20):
        source.image(i).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(source.captions(i)[0])
    for i in bad:
        (folder / f"{i:02}.png").write_bytes(b"no picture")
    data = {"path": str(folder), "bad_sample_budget": 0.5}
    here = fill(cache_config(tmp_path / "here", teacher, data=data))
    workers.dies_after = 1
    with pytest.raises(errors.ClipdistillError, match="killed"):
        fill(cache_config(tmp_path / "there", teacher, data=data, engine="ray"))
    workers.dies_after = None
    there = fill(cache_config(tmp_path / "there", teacher, data=data, engine="ray"))
    assert [len(tasks) for tasks in workers.tasks] == [3, 2]
    assert (here.bad, there.bad, there.samples) == (3, 3, 16)  # block 2 was there already
    left, right = files(tmp_path / "here"), files(tmp_path / "there")
    assert sorted(left.pop("bad_samples.jsonl").splitlines()) == sorted(right.pop("bad_samples.jsonl").splitlines())
    assert left == right


def test_one_driver_at_a_time(workers, teacher, tmp_path):
    config = cache_config(tmp_path / "cache", teacher, 20, engine="ray")

    def second(done, total, rate):
        with pytest.raises(InputError, match="is being filled on Ray"):
            fill(config)

    fill(config, progress=second)


@pytest.mark.parametrize("bad", [(), (3, 40)])
def test_pairs_are_encoded_to_the_same_bits(bad, workers, model):
    here = encode_pairs(model, ColourPairs(per_colour=14, bad=bad), batch_size=4, progress=False)
    there = encode_pairs(model, ColourPairs(per_colour=14, bad=bad), batch_size=4, progress=False, engine="ray")
    assert torch.equal(here.image, there.image)
    assert torch.equal(here.text, there.text)
    assert (here.keys, here.captions, here.problems) == (there.keys, there.captions, there.problems)
    assert len(workers.tasks) == 1  # pictures and captions go out together
    assert max(len(task["images"]) for task in workers.tasks[0] if "images" in task) <= 8


def test_scores_are_the_same(workers, teacher):
    here = cd.evaluate(teacher, "scenes:val?size=12", batch_size=5, progress=False)
    there = cd.evaluate(teacher, "scenes:val?size=12", batch_size=5, progress=False, engine="ray")
    assert str(there) == str(here)
    assert there.notes == here.notes


@pytest.mark.parametrize("captions", [None, "all"])
def test_files_of_embeddings_hold_the_same_bytes(captions, workers, teacher, tmp_path):
    for name, engine in (("here", "torch"), ("there", "ray")):
        cd.embed_to_file(
            teacher, "scenes:val?size=21", tmp_path / f"{name}.npy", captions=captions, part=7, batch_size=4,
            engine=engine, progress=False,
        )  # fmt: skip
    for suffix in (".npy", ".jsonl", ".npy.json"):
        assert (tmp_path / f"here{suffix}").read_bytes() == (tmp_path / f"there{suffix}").read_bytes()


def test_parts_of_another_size_are_not_taken_for_those_of_this_one(teacher, tmp_path, monkeypatch):
    source, model = open_scenes("val", 20, 0), cd.load_model(teacher, teacher=True)
    whole = job._assemble
    monkeypatch.setattr(job, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        job.embed_to_file(model, source, tmp_path / "x.npy", part=8, batch_size=4, progress=False)
    monkeypatch.setattr(job, "_assemble", whole)
    report = job.embed_to_file(model, source, tmp_path / "x.npy", part=4, batch_size=4, progress=False)
    assert report.rows == 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ray:auto", "name one of torch"),
        ("ray:onxn", r"'onxn' cannot stand here \(did you mean 'onnx'\?\)"),
        ("ray:", "'' cannot stand here"),
        ("ray:onnx,torch", "'torch' cannot stand here; one engine runs the towers"),
        ("ray:worker=2", r"no setting 'worker' \(did you mean 'workers'\?\)"),
        ("ray:workers=0", "workers must be a whole number from 1 on"),
        ("ray:workers=²", "workers must be a whole number"),
        ("ray:cpus=2,cpus=2", "cpus stands twice"),
        ("ray:device=tpu", "cpu or cuda"),
    ],
)
def test_a_name_combined_wrongly_is_one_sentence(text, said, capsys, tmp_path):
    with pytest.raises(InputError, match=said):
        names.read(text)
    cache = ["cache", "--teacher", "x", "--data", "scenes", "--out", str(tmp_path / "c")]
    for command in (cache, ["embed", "x", "--data", "scenes", "--out", "x.npy"], ["eval", "x", "--data", "scenes"]):
        assert main([*command, "--engine", text]) == 2
        assert re.fullmatch(f"clipdistill: .*{said}.*\\n", capsys.readouterr().err)


def test_names_are_read(monkeypatch):
    monkeypatch.setattr(names, "find_spec", lambda name: True)
    assert names.read("ray") == names.RayEngine()
    assert names.read("ray:onnx,workers=8, cpus=4") == names.RayEngine("onnx", 8, 4)
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"engine 'ray:onnx' needs the package 'ray': .*clipdistill\[ray\]"):
        names.read("ray:onnx")


def test_processes_that_decode_are_refused(workers, teacher, tmp_path):
    with pytest.raises(InputError, match=r"each of Ray's workers decodes for itself.*ray:workers=8"):
        fill(cache_config(tmp_path / "cache", teacher, 20, engine="ray", workers=2))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nobody", "http://[", "ray://"])
def test_an_address_where_no_cluster_is(address):
    with pytest.raises(InputError, match=r"RAY_ADDRESS=.*leave RAY_ADDRESS out") as told:
        cluster._require_reachable(address)
    assert "\n" not in str(told.value)
