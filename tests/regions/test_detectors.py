"""Detectors by name and the folder that keeps what they found."""

from __future__ import annotations

import builtins
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clipdistill.data.open import open_pairs
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError
from clipdistill.regions import box_file
from clipdistill.regions.box_file import BoxFile, detect
from clipdistill.regions.boxes import Boxes
from clipdistill.regions.detectors import Grid, is_detector, open_detector


def test_grid_tiles_cover_the_picture() -> None:
    (boxes,) = open_detector("grid:1+2")([Image.new("RGB", (40, 20))])
    assert boxes.corners.tolist() == [
        [0, 0, 40, 20],
        [0, 0, 20, 10],
        [20, 0, 40, 10],
        [0, 10, 20, 20],
        [20, 10, 40, 20],
    ]
    assert boxes.areas.sum() == pytest.approx(2)
    assert boxes.confidence.tolist() == [1] * 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gird:2", "did you mean 'grid'"),
        ("grid:0", "from 1 to 9"),
        ("torchvision:fasterrcnn_resnet50", "no detector 'fasterrcnn_resnet50' .did you mean"),
        ("torchvision:ssdlite320_mobilenet_v3_large@absent.safetensors", "no such file"),
        ("hf:nothing", "owner/name"),
    ],
)
def test_unknown_detectors(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_detector(name)


def test_names_are_told_from_files() -> None:
    assert is_detector("grid:2")
    assert is_detector("hf:owner/name")
    assert not is_detector("boxes/instances.json")


def test_torchvision_weights_from_a_file(tmp_path: Path) -> None:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    with torch.no_grad():  # random weights find nothing: one class is made certain everywhere
        for layer in model.head.classification_head.module_list:
            layer[1].bias.view(-1, 91)[:, 17] = 9.0
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    detector = open_detector(f"torchvision:ssdlite320_mobilenet_v3_large@{path}")
    picture = Image.effect_noise((48, 32), 60).convert("RGB")
    (found,) = detector([picture])
    assert len(found) > 0
    assert found.confidence.min() > 0.9
    assert set(found.labels) == {"17"}
    assert found.corners.min() >= 0
    assert found.corners[:, 2].max() <= 48
    with torch.no_grad():
        from torchvision.transforms.functional import to_tensor

        own = model([to_tensor(picture)])[0]
    torch.testing.assert_close(torch.from_numpy(found.corners), own["boxes"][: len(found)])
    first = detector.fingerprint()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    other = open_detector(f"torchvision:ssdlite320_mobilenet_v3_large@{tmp_path / 'weights.pth'}")
    assert other.fingerprint() != first
    save_file({"other": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="weights are not those of"):
        open_detector(f"torchvision:ssdlite320_mobilenet_v3_large@{path}")


def test_weights_that_are_a_pickle_are_refused(tmp_path: Path) -> None:
    torch.save({"model": types.SimpleNamespace()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="Python objects besides tensors"):
        open_detector(f"torchvision:ssdlite320_mobilenet_v3_large@{tmp_path / 'w.pth'}")


def test_weights_are_not_fetched_where_the_network_is_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match=r"network is forbidden: give a file of weights"):
        open_detector("torchvision:ssdlite320_mobilenet_v3_large")


def test_hugging_face_detector_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=16,
        num_detection_tokens=5,
        num_labels=2,
        id2label={0: "cat", 1: "dog"},
    )
    model = transformers.YolosForObjectDetection(config).eval()
    with torch.no_grad():
        model.class_labels_classifier.layers[-1].bias.copy_(torch.tensor([0.0, 6.0, 0.0]))
    model.save_pretrained(tmp_path)
    transformers.YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    detector = open_detector(f"hf:{tmp_path}")
    found = detector([Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 40), "blue")])
    assert [len(one) for one in found] == [5, 5]
    assert set(found[0].labels) == {"dog"}
    assert (found[1].width, found[1].height) == (20, 40)
    assert len(detector.fingerprint()) == 64
    os.truncate(tmp_path / "model.safetensors", 10)  # mapped weights would end the process here
    again = detector([Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 40), "blue")])
    assert torch.equal(torch.as_tensor(again[0].confidence), torch.as_tensor(found[0].confidence))
    with pytest.raises(InputError, match="not an object detector"):
        open_detector(f"hf:{tmp_path.parent}")


def test_ultralytics_only_if_the_user_installed_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_import = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "ultralytics":
            raise ImportError
        return plain_import(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"AGPL-3\.0"):
        open_detector("ultralytics:yolov8x.pt")
    monkeypatch.undo()

    class Yolo:
        def __init__(self, weights: str) -> None:
            self.model = torch.nn.Linear(1, 1)

        def predict(self, images: Sequence[Any], conf: float, device: str, verbose: bool) -> list[Any]:
            found = types.SimpleNamespace(
                xyxy=torch.tensor([[1.0, 2, 9, 8]]), conf=torch.tensor([0.75]), cls=torch.tensor([1.0])
            )
            return [types.SimpleNamespace(boxes=found, names={1: "dog"}) for _ in images]

    monkeypatch.setitem(sys.modules, "ultralytics", types.SimpleNamespace(YOLO=Yolo))  # type: ignore[arg-type]
    (boxes,) = open_detector("ultralytics:yolov8x.pt")([Image.new("RGB", (10, 10))])
    assert boxes.corners.tolist() == [[1, 2, 9, 8]]
    assert boxes.labels == ("dog",)
    assert "AGPL-3.0" in capsys.readouterr().out


class Counting(Grid):
    """A detector that counts the pictures it was shown, and can break down."""

    def __init__(self, fails_after: int | None = None, sizes: str = "2") -> None:
        super().__init__(sizes, torch.device("cpu"))
        self.seen = 0
        self.fails_after = fails_after

    def __call__(self, images: Sequence[Image.Image]) -> list[Boxes]:
        self.seen += len(images)
        if self.fails_after is not None and self.seen > self.fails_after:
            raise KeyboardInterrupt
        return super().__call__(images)


def test_proposals_are_kept_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box_file, "_IMAGES", 4)
    source = open_pairs("scenes:val?size=10")
    with pytest.raises(KeyboardInterrupt):
        detect(source, Counting(fails_after=8), tmp_path / "boxes", batch_size=3)
    second = Counting()
    boxes = detect(source, second, tmp_path / "boxes", batch_size=3)
    assert second.seen == 2  # the first two parts of four were there
    assert len(boxes) == 10
    third = Counting()
    again = detect(source, third, tmp_path / "boxes")
    assert third.seen == 0
    assert again.fingerprint() == boxes.fingerprint()
    size = source.image(3).size
    found = BoxFile(tmp_path / "boxes").get(source.key(3), *size)
    assert found is not None
    assert len(found) == 4
    with pytest.raises(InputError, match="another detector"):
        detect(source, Counting(sizes="3"), tmp_path / "boxes")
    with pytest.raises(InputError, match="other data"):
        detect(open_pairs("scenes:val?size=11"), Counting(), tmp_path / "boxes")
    with pytest.raises(InputError, match="not empty"):
        detect(source, Counting(), tmp_path)


def test_an_unreadable_image_has_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_pairs("scenes:val?size=4")
    image = type(source).image

    def broken(self: Any, i: int, at_least: int | None = None) -> Image.Image:
        if i == 1:
            raise BadSample("truncated image", source.key(1))
        return image(self, i, at_least)

    monkeypatch.setattr(type(source), "image", broken)
    boxes = detect(source, Counting(), tmp_path / "boxes")
    assert len(boxes) == 3
    assert boxes.missing(source.key(i) for i in range(4)) == [source.key(1)]


@pytest.mark.parametrize("content", [b"", bytes(40), b"[]", b"{", b"\xff", b'{"format": 3}', b'"x"'])
def test_proposals_with_a_damaged_description_are_one_sentence(tmp_path: Path, content: bytes) -> None:
    source = open_pairs("scenes:val?size=4")
    detect(source, Counting(), tmp_path / "boxes")
    (tmp_path / "boxes" / "proposals.json").write_bytes(content)
    with pytest.raises(InputError, match="give a new folder, or remove this one") as caught:
        detect(source, Counting(), tmp_path / "boxes")
    assert "\n" not in str(caught.value)
