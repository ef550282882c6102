"""The model card, and the upload with the hub's client replaced."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clipdistill.errors import InputError
from clipdistill.export.hub import model_card, public_text, push_to_hub
from clipdistill.statistics.protocol import Protocol
from clipdistill.statistics.scores import Score, Scores

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    values = {
        "format": 1, "name": "rd", "recipe": "clip-rd", "method": "CLIP-RD", "teacher": "ViT-B-16/laion400m_e32",
        "student": "ViT-T-16", "data": "/home/someone/data/flickr8k.json", "seed": 7, "samples_seen": 1_234_567,
        "seconds": 7200.0, "device": "cpu", "parameters": {"total": 26_000_000},
        "command": "clipdistill train --recipe clip-rd --data /home/someone/data/flickr8k.json --out runs/rd",
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(values))
    protocol = Protocol(
        name="standard", task="retrieval", dataset="flickr8k", split="test", images=1000, captions=5000,
        captions_per_image="all", transform="t", dtype="float32", keys_sha256="k", model_fingerprint="f",
    )  # fmt: skip
    (folder / "scores.json").write_text(Scores([Score("i2t_R@1", 0.412, 1000, protocol, 0.39, 0.43)]).to_json())
    bench = {
        "device": {"label": "two cores"},
        "measurements": [{"model": "student", "tower": "image", "backend": "eager", "dtype": "float32", "batch": 1,
                          "value": 55.5}],
    }  # fmt: skip
    (folder / "bench.json").write_text(json.dumps(bench))
    return folder


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_cfg": {"text_cfg": {"hf_tokenizer_name": "tokenizer.json"}}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def test_card_says_how_it_was_made_and_measured(run, model):
    card = model_card(model, "me/student", run)
    facts = front(card)
    assert facts["library_name"] == "open_clip"
    assert facts["base_model"] == "timm/vit_base_patch16_clip_224.laion400m_e32"  # where open_clip's own table has it
    assert facts["datasets"] == ["flickr8k"]
    (score, latency) = [entry["metrics"][0] for entry in facts["model-index"][0]["results"]]
    assert (score["name"], score["type"], score["value"]) == ("image to text R@1", "recall", 41.2)
    assert score["args"]["interval_95"] == [39.0, 43.0]
    assert "standard: flickr8k/test, 1,000 images" in score["args"]["protocol"]
    assert latency["name"] == "milliseconds, eager, float32"
    assert latency["value"] == pytest.approx(1000 / 55.5, abs=1e-3)
    for part in (
        "CLIP-RD", "ViT-B-16/laion400m_e32", "| data | flickr8k.json |", "1,234,567", "26,000,000",
        "retrieval, standard: flickr8k/test, 1,000 images, 5,000 captions (all)", "41.2 [39.0, 43.0]",
        "2.00 hours on cpu", "55.5 per second", "two cores", "hf-hub:me/student", "--out runs/rd",
    ):  # fmt: skip
        assert part in card, part
    assert "/home" not in card


def test_licence_and_unknown_teachers(run, model):
    facts = front(model_card(model, "me/student", run, "apache-2.0"))
    assert facts["license"] == "apache-2.0"
    values = json.loads((run / "run.json").read_text())
    for teacher, base in (
        ("hf:me/teacher", "me/teacher"),
        ("runs/teacher", None),
        ("towers:image=timm:x,text=hf:me/y", None),
        (["hf:me/a", "hf-hub:me/b", "/data/c"], ["me/a", "me/b"]),
    ):
        (run / "run.json").write_text(json.dumps(values | {"teacher": teacher, "data": "scenes/train"}))
        facts = front(model_card(model, "me/student", run))
        assert facts.get("base_model") == base, teacher
        assert facts["datasets"] == ["scenes"]
        assert "license" not in facts


def test_no_folder_of_this_machine_is_told():
    for text, public in (
        (
            "towers:image=timm:a@/home/me/a.safetensors,text=hf:/home/me/minilm",
            "towers:image=timm:a@a.safetensors,text=hf:minilm",
        ),
        ("/home/me/data/flickr8k.json:train", "flickr8k.json:train"),
        ("s3://bucket/key and https://host/a/b", "s3://bucket/key and https://host/a/b"),
        ("ViT-B-16/laion400m_e32 runs/rd", "ViT-B-16/laion400m_e32 runs/rd"),
    ):
        assert public_text(text) == public


def front(card):
    """The YAML at the top of a card, as the hub's own client reads it."""
    return huggingface_hub.ModelCard(card, ignore_metadata_errors=False).data.to_dict()


def test_card_of_an_export_repeats_its_manifest(exported):
    card = model_card(exported, "me/tiny")
    assert front(card)["library_name"] == "onnx"
    assert "model-index" not in front(card)
    assert "R@1 before" in card
    assert "squares/test, 16 images, 32 captions" in card
    assert "example.py" in card
    assert "cost" not in card


class Recorder:
    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    error: Exception | None = None

    def create_repo(self, repository, **settings):
        if self.error is not None:
            raise self.error
        self.calls.append(("create", {"repository": repository, **settings}))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, **settings):
        self.calls.append(("upload", settings))


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("clipdistill.export.hub.offline", lambda: False)
    monkeypatch.setattr("clipdistill.export.hub.reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "HfApi", Recorder)
    monkeypatch.setattr(Recorder, "calls", [])
    return Recorder


def test_upload(run, model, recorder):
    assert push_to_hub(model, "me/student", source=run, private=True).endswith("me/student")
    assert recorder.calls == [
        ("create", {"repository": "me/student", "private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/student", "folder_path": str(model), "commit_message": "Upload by clipdistill"}),
    ]
    assert (model / "README.md").read_text() == model_card(model, "me/student", run)
    config = json.loads((model / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "me/student"


def test_a_text_of_the_user_is_uploaded_and_a_card_is_made_anew(model, recorder):
    push_to_hub(model, "me/student")
    push_to_hub(model, "me/other")
    assert "# other" in (model / "README.md").read_text()
    (model / "README.md").write_text("# mine\n")
    push_to_hub(model, "me/student")
    assert (model / "README.md").read_text() == "# mine\n"


def test_what_the_hub_refuses_is_one_sentence(model, recorder, monkeypatch):
    monkeypatch.setattr(Recorder, "error", RuntimeError("401 Unauthorized\nmore"))
    with pytest.raises(InputError, match=r"the hub did not take the upload \(401 Unauthorized\)"):
        push_to_hub(model, "me/student")


def test_bad_names_and_no_network(model, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="owner/name"):
        push_to_hub(model, "student")
    with pytest.raises(InputError, match="export the model first"):
        push_to_hub(tmp_path / "absent", "me/student")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        push_to_hub(model, "me/student")
    assert not (model / "README.md").exists()
