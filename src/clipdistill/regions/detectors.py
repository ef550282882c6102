"""Detectors by name.

grid:1+2+3                                   no network at all: the tiles of 1 x 1, 2 x 2 and 3 x 3, confidence 1
torchvision:fasterrcnn_resnet50_fpn_v2       torchvision, its COCO weights (fetched if they are not there)
torchvision:ssdlite320_mobilenet_v3_large@w.safetensors      the same with weights from a file
hf:owner/name, hf:folder                     an object detector of transformers (extra `regions`)
ultralytics:yolov8x.pt                       YOLO, where the user has installed ultralytics (AGPL-3.0)
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipdistill.errors import InputError, nearest, needing
from clipdistill.models.clip_model import hash_tensors
from clipdistill.models.hub import offline, require_network
from clipdistill.models.weights import read_state_dict
from clipdistill.regions.boxes import Boxes, Detector

DEFAULT_CONFIDENCE = 0.25
"""Detections below are never stored (YOLO's own threshold, which DCLIP used); raise it by `limits.min_confidence`."""

LICENCE_NOTICE = (
    "ultralytics is licensed under AGPL-3.0, which reaches the software and services that are built with it; it is no "
    "part of clipdistill and was installed by you (boxes from another detector can be given as a file instead)"
)


def is_detector(name: str) -> bool:
    """Whether `name` is a detector rather than a file of boxes."""
    return name.partition(":")[0] in _KINDS


def open_detector(name: str, device: torch.device | str = "cpu") -> Detector:
    """The detector called `name` (see the module). Raises InputError for unknown names and unusable weights."""
    kind, _, rest = name.partition(":")
    if kind not in _KINDS:
        raise InputError(f"'{name}' is no detector{nearest(kind, _KINDS)}")
    return _KINDS[kind](rest, torch.device(device))


class Grid:
    """Tiles of every picture: a source of regions where there is no detector. Says nothing about objects."""

    def __init__(self, sizes: str, device: torch.device) -> None:
        text = sizes or "1+2"
        if not re.fullmatch(r"[1-9](\+[1-9])*", text):
            raise InputError(f"'grid:{sizes}': expected numbers of tiles a side from 1 to 9, for example  grid:1+2+3")
        self.sizes = tuple(int(part) for part in text.split("+"))
        self.name = f"grid:{text}"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    def __call__(self, images: Sequence[Image.Image]) -> list[Boxes]:
        return [self._tiles(*image.size) for image in images]

    def _tiles(self, width: int, height: int) -> Boxes:
        corners = [
            [width * x / n, height * y / n, width * (x + 1) / n, height * (y + 1) / n]
            for n in self.sizes
            for y in range(n)
            for x in range(n)
        ]
        return Boxes.of(width, height, corners)


class _Network:
    """A detector with weights: a module on a device, and a text that names everything else its boxes depend on."""

    def __init__(self, name: str, module: Any, device: torch.device, identity: str) -> None:
        self.name, self._module, self._device, self._identity = name, module.eval().to(device), device, identity

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._identity.encode())
        hash_tensors(self._module.state_dict(), digest)
        return digest.hexdigest()


def _kept(image: Image.Image, corners: torch.Tensor, scores: torch.Tensor, labels: Sequence[str]) -> Boxes:
    boxes = Boxes.of(*image.size, corners.cpu().numpy(), scores.float().clamp(0, 1).cpu().numpy(), labels)
    return boxes.chosen(boxes.confidence >= DEFAULT_CONFIDENCE)


class TorchvisionDetector(_Network):
    """A detection model of torchvision; weights from a safetensors file, a PyTorch file of tensors, or its own."""

    def __init__(self, rest: str, device: torch.device) -> None:
        from torchvision.models import detection as models
        from torchvision.models import get_model, get_model_weights, list_models

        architecture, at, file = rest.partition("@")
        name, known = f"torchvision:{rest}", list_models(module=models)
        if architecture not in known:
            raise InputError(f"torchvision has no detector '{architecture}'{nearest(architecture, known)}")
        self._categories: tuple[str, ...] = ()
        settings: dict[str, Any] = {"weights": None, "weights_backbone": None}
        if at:
            tensors = read_state_dict(Path(file).expanduser())
            # the names of a two-stage detector's weights tell how many classes it was trained for
            scores = tensors.get("roi_heads.box_predictor.cls_score.weight")
            if scores is not None:
                settings["num_classes"] = len(scores)
        else:
            weights = get_model_weights(architecture).DEFAULT
            tensors = _download(weights, name)
            self._categories = tuple(weights.meta.get("categories", ()))
            settings["num_classes"] = len(self._categories)
        module = get_model(architecture, **settings)
        try:
            module.load_state_dict(tensors)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise InputError(f"{name}: the weights are not those of {architecture} ({first[:200]})") from error
        super().__init__(name, module, device, f"torchvision:{architecture}")

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[Boxes]:
        pixels = [torch.from_numpy(np.array(i)).permute(2, 0, 1).float().div(255).to(self._device) for i in images]
        return [
            _kept(image, found["boxes"], found["scores"], self._labels(found["labels"]))
            for image, found in zip(images, self._module(pixels), strict=True)
        ]

    def _labels(self, numbers: torch.Tensor) -> list[str]:
        known = self._categories
        return [known[n] if n < len(known) else str(n) for n in numbers.tolist()]


def _download(weights: Any, name: str) -> dict[str, torch.Tensor]:
    """torchvision's own weights from its cache, else fetched after saying so."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    advice = f"give a file of weights, {name}@weights.safetensors, or boxes as a file"
    if not cached.exists():
        if offline():
            raise InputError(f"{name}: its weights are not on this machine and the network is forbidden: {advice}")
        print(f"{name}: fetching weights from {weights.url}")
    try:
        tensors: dict[str, torch.Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # urllib raises many kinds
        raise InputError(f"{name}: its weights could not be fetched ({type(error).__name__}): {advice}") from error
    return tensors


class HuggingFaceDetector(_Network):
    """An object detector of transformers (YOLOS, RT-DETR, DETR, ...), safetensors weights only, no remote code."""

    def __init__(self, rest: str, device: torch.device) -> None:
        name, local = f"hf:{rest}", Path(rest).is_dir()
        if not local and rest.count("/") != 1:
            raise InputError(f"'{name}': expected  hf:owner/name  or  hf:  and the path of a folder")
        with needing("transformers", "regions", f"the detector '{name}'"):
            import transformers

        def load(local_only: bool) -> Any:
            options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local_only}
            self._processor = transformers.AutoImageProcessor.from_pretrained(rest, **options)
            auto = transformers.AutoModelForObjectDetection
            found = auto.from_pretrained(rest, use_safetensors=True, **options)
            for tensor in itertools.chain(found.parameters(), found.buffers()):
                tensor.data = tensor.data.clone()  # they lie in the mapped file, which others may write over
            return found

        try:
            try:
                module = load(True)
            except OSError:
                if local:
                    raise
                require_network(f"the detector {name}", rest)
                module = load(False)
        except InputError:
            raise
        except Exception as error:  # transformers raises many kinds for a folder that is something else
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            raise InputError(f"{name}: not an object detector that transformers reads ({reason})") from error
        super().__init__(name, module, device, f"hf {self._processor.to_json_string()}")

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[Boxes]:
        output = self._module(**self._processor(images=list(images), return_tensors="pt").to(self._device))
        sizes = torch.tensor([[image.height, image.width] for image in images]).to(self._device)
        found = self._processor.post_process_object_detection(output, threshold=DEFAULT_CONFIDENCE, target_sizes=sizes)
        names = self._module.config.id2label
        return [
            _kept(image, one["boxes"], one["scores"], [str(names.get(n, n)) for n in one["labels"].tolist()])
            for image, one in zip(images, found, strict=True)
        ]


class UltralyticsDetector(_Network):
    """YOLO of ultralytics, used only when the user has installed it and names it; prints what its licence asks."""

    def __init__(self, rest: str, device: torch.device) -> None:
        weights = rest or "yolov8x.pt"
        name = f"ultralytics:{weights}"
        try:
            from ultralytics import YOLO
        except ImportError as error:
            raise InputError(
                f"the detector '{name}' needs ultralytics, which is licensed under AGPL-3.0 and therefore no "
                "dependency of clipdistill: install it yourself (pip install ultralytics), or give boxes as a file"
            ) from error
        print(LICENCE_NOTICE)
        self._model = YOLO(weights)
        super().__init__(name, self._model.model, device, "ultralytics")

    def __call__(self, images: Sequence[Image.Image]) -> list[Boxes]:
        # ultralytics takes lists of PIL pictures as they are (RGB)
        found = self._model.predict(list(images), conf=DEFAULT_CONFIDENCE, device=str(self._device), verbose=False)
        return [
            _kept(image, one.boxes.xyxy, one.boxes.conf, [str(one.names[int(n)]) for n in one.boxes.cls.tolist()])
            for image, one in zip(images, found, strict=True)
        ]


_KINDS: dict[str, Callable[[str, torch.device], Detector]] = {
    "grid": Grid,
    "torchvision": TorchvisionDetector,
    "hf": HuggingFaceDetector,
    "ultralytics": UltralyticsDetector,
}
