"""Models by name: one way to name a model everywhere, and one function that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.save import DESCRIPTION, read_model
from clipdistill.models.students import build_student
from clipdistill.models.tokenizers import Tokenizer


def load_model(name: str | Path, *, device: str | torch.device = "cpu", teacher: bool = False) -> ClipModel:
    """The model called `name`, on `device`. `teacher` True: in evaluation mode and without gradients."""
    path = Path(name)
    if (path / DESCRIPTION).exists():
        model = read_model(path)
    elif (path / "student" / DESCRIPTION).exists():
        model = read_model(path / "student")
    elif path.exists():
        raise InputError(f"{path}: not a model folder")
    else:
        model = build_student(str(name), seed=0)
    model.module.to(device)
    if teacher:
        model.module.eval().requires_grad_(False)
    return model


@dataclass(frozen=True)
class Preprocess:
    """Picture to tensor, as a model expects it: PIL image to float (3, size, size). The evaluation view, no augmentation."""

    image: ImageSpec

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        from clipdistill.data.views import EVALUATION_VIEW, render

        return render(picture.convert("RGB"), EVALUATION_VIEW, self.image)


def load_student(path: str | Path, *, device: str | torch.device = "cpu") -> tuple[nn.Module, Preprocess, Tokenizer]:
    """A trained model ready for use: (module in evaluation mode, preprocess, tokenizer). `path` may be any model name.

    module.encode_image(preprocess(picture)[None]) and module.encode_text(tokenizer(["a caption"])) give (1, embed_dim), not normalised.
    """
    model = load_model(path, device=device, teacher=True)
    return model.module, Preprocess(model.image), model.tokenizer
