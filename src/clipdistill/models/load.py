"""Models by name: one way to name a model everywhere, and one function that reads it.

ViT-B-16/laion400m_e32      open_clip's architecture and pretrained weights
ViT-T-16                    a registered student or an open_clip architecture, random weights
scenes-teacher              the trained teacher of the demo, which comes with the package
ViT-B-16@weights.pt         a checkpoint file with the architecture named; weights.pt alone where the shapes tell
hf:owner/name               a model of the Hugging Face hub
local-dir:DIR               open_clip's word for a folder, the same as DIR
onnx:DIR, openvino:DIR      an export (clipdistill export), run by that runtime: to evaluate, measure, teach
litert:DIR, executorch:DIR  one for a phone, run by the phone's runtime on this machine; coreml:DIR on a Mac
timm:name                   a timm image tower with the default text tower; weights if the name has one of timm's tags
runs/x                      a run, its student/, its checkpoints/step-00000100; any model folder;
                            a Hugging Face CLIP folder; an open_clip folder
inherit:SIZES,from=MODEL    a smaller model cut out of another one (models/inherited.py)
towers:image=X,text=Y       an image and a text tower of any origin, joined (models/towers/names.py)
module:NAME                 a module that the program holds; `load_model` takes the module itself too
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipdistill.arguments import checked
from clipdistill.data.objects import as_picture
from clipdistill.data.problems import BadSample
from clipdistill.data.views import EVALUATION_VIEW, ImageSpec, render
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel, require_usable
from clipdistill.models.inherited import PREFIX, parse
from clipdistill.models.known import (
    EXPORT_MANIFEST,
    HELD,
    HUGGING_FACE_CONFIG,
    OPEN_CLIP_CONFIG,
    SHIPPED,
    SUFFIX,
    known_architectures,
    offering,
    shipped_models,
)
from clipdistill.models.names import check_model_name
from clipdistill.models.own import clip_model_of, held_model, teacher_of_kind
from clipdistill.models.save import DESCRIPTION, read_model
from clipdistill.models.students import build_student, timm_student
from clipdistill.models.tokenizers import Tokenizer
from clipdistill.registry import INHERITANCE, TEACHERS, needed_wing
from clipdistill.runtime.machine import pick_device

logger = logging.getLogger("clipdistill")


@partial(checked, lent=False)
def load_model(
    name: str | Path | nn.Module | ClipModel,
    *,
    device: str | torch.device = "cpu",
    teacher: bool = False,
    image_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
) -> ClipModel:
    """Returns the model called `name` (docs/models.md has the forms), weights in fp32, on `device`.

    `name` may be an nn.Module with encode_image and encode_text, which is used itself and not a copy (models/own.py).
    `teacher` True: in evaluation mode and without gradients. `image_size`: another resolution in pixels than the
    model's own; position embeddings are interpolated. `tokenizer`, `seed`: for models with random weights only, as in
    build_student. Raises InputError, one sentence, for a name that is nothing known (with the nearest one), a file that
    is not what it should be, weights of another architecture, or weights that are not on this machine when the hub is
    forbidden or out of reach.
    """
    if isinstance(name, ClipModel):
        model = name
    else:
        model = clip_model_of(name) if isinstance(name, nn.Module) else _read(str(name), tokenizer, seed)
    if image_size is not None:
        with_image_size = needed_wing("clipdistill.models.resolution:with_image_size", "another picture size is")
        model = with_image_size(model, image_size)
    model.module.to(pick_device(device))
    if teacher:
        model.module.eval().requires_grad_(False)
    require_usable(model)
    return model


def _read(name: str, tokenizer: Tokenizer | None, seed: int) -> ClipModel:
    check_model_name(name)
    prefix, colon, rest = name.partition(":")
    if colon and prefix in _PREFIXES:
        return _PREFIXES[prefix](rest, tokenizer, seed)
    if colon and prefix in TEACHERS:
        return teacher_of_kind(prefix, rest)
    if name in shipped_models():
        return read_model(SHIPPED / name)
    if name in known_architectures():
        return build_student(name, seed=seed, tokenizer=tokenizer)
    path = Path(name).expanduser()
    if path.exists() and "@" not in name:
        return read_folder(path, name) if path.is_dir() else read_file(path)
    from clipdistill.models.open_clip_models import read_checkpoint, read_pretrained

    architecture, at, file = name.partition("@")
    return read_checkpoint(Path(file).expanduser(), architecture) if at else read_pretrained(*name.split("/"))


def _from_hub(repository: str, tokenizer: Tokenizer | None, seed: int) -> ClipModel:
    """`hf:owner/name`: a model folder, an open_clip model or a CLIP of transformers, told apart by their files."""
    from clipdistill.models import hub
    from clipdistill.models.hugging_face import PREPROCESSOR_FILES, TOKENIZER_FILES

    name = f"hf:{repository}"
    if Path(repository).is_dir():
        return read_folder(Path(repository), name)
    for files in _HUB_FORMS:
        # the cached snapshot that holds one file of each group
        local = [next((path for file in choices if (path := hub.cached(repository, file))), None) for choices in files]
        if all(local) and local[0] is not None:
            return read_folder(local[0].parent, name)
    listed = set(hub.list_files(repository, f"the model {name}"))
    for files in _HUB_FORMS:
        wanted = [next((file for file in choices if file in listed), None) for choices in files]
        if all(wanted):
            extra = listed & {*TOKENIZER_FILES, *PREPROCESSOR_FILES}
            paths = [hub.fetch(repository, (file,), f"{file} of {name}") for file in [*wanted, *sorted(extra)] if file]
            return read_folder(paths[0].parent, name)
    raise InputError(
        f"'{name}': the repository holds no CLIP model "
        f"(no {DESCRIPTION}, {OPEN_CLIP_CONFIG} or {HUGGING_FACE_CONFIG} with weights)"
    )


# for each form of model: groups of files, one of each group is needed
_HUB_FORMS = (
    ((DESCRIPTION,), ("model.safetensors",)),
    ((OPEN_CLIP_CONFIG,), ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")),
    ((HUGGING_FACE_CONFIG,), ("model.safetensors", "pytorch_model.bin")),
)


def _exported(runtime: str) -> Callable[[str, Tokenizer | None, int], ClipModel]:
    def read(folder: str, tokenizer: Tokenizer | None, seed: int) -> ClipModel:
        from clipdistill.models.exported import read_exported

        return read_exported(Path(folder).expanduser(), f"{runtime}:{folder}", runtime)

    return read


def _inherited(sizes: str, tokenizer: Tokenizer | None, seed: int) -> ClipModel:
    wanted = parse(PREFIX + sizes)
    if wanted.source is None:
        raise InputError(f"'{PREFIX}{sizes}': say which model to inherit from, for example  {PREFIX}{sizes},from=MODEL")
    cut = INHERITANCE.get("cut")
    return cut(load_model(wanted.source, tokenizer=tokenizer, seed=seed), wanted, seed=seed)


def _joined(towers: str, tokenizer: Tokenizer | None, seed: int) -> ClipModel:
    from clipdistill.models.towers.read import read_towers

    return read_towers(f"towers:{towers}", load_model, seed=seed)


_PREFIXES: dict[str, Callable[[str, Tokenizer | None, int], ClipModel]] = {
    "hf": _from_hub,
    "local-dir": lambda folder, tokenizer, seed: read_folder(Path(folder).expanduser(), f"local-dir:{folder}"),
    "timm": lambda network, tokenizer, seed: timm_student(network, seed=seed, tokenizer=tokenizer),
    **{runtime: _exported(runtime) for runtime in SUFFIX},
    "inherit": _inherited,
    "towers": _joined,
    HELD[:-1]: lambda name, tokenizer, seed: held_model(HELD + name),
}


def read_folder(folder: Path, name: str) -> ClipModel:
    """The model in a folder: model folder, run, checkpoint of a run, open_clip or Hugging Face CLIP folder."""
    if (folder / DESCRIPTION).exists():
        return read_model(folder)
    if any((part / "meta_teacher.json").exists() for part in (folder, folder / "student")):
        raise InputError(
            f"{folder}: a region teacher, which needs boxes of every image: name it as the teacher of a training run, "
            "measure it with `clipdistill regions measure`, or take its frozen CLIP, the folder clip/ in it"
        )
    if (folder / "student" / DESCRIPTION).exists():
        return read_model(folder / "student")
    if (folder / "checkpoints").is_dir():
        return _newest_checkpoint(folder)
    if (folder / OPEN_CLIP_CONFIG).exists():
        from clipdistill.models.open_clip_models import read_open_clip_folder

        return read_open_clip_folder(folder, name)
    if (folder / HUGGING_FACE_CONFIG).exists():
        from clipdistill.models.hugging_face import read_hugging_face

        return read_hugging_face(folder, name)
    runtime = next((name for name, suffix in SUFFIX.items() if (folder / f"image{suffix}").exists()), None)
    if (folder / EXPORT_MANIFEST).exists() and runtime is not None:
        raise InputError(f"{folder}: an exported model is named with its runtime:  {runtime}:{name}")
    raise InputError(
        f"{folder}: holds no model: expected {DESCRIPTION} (a model folder), student/ (a run or checkpoint), "
        f"{OPEN_CLIP_CONFIG} or {HUGGING_FACE_CONFIG}"
    )


def _newest_checkpoint(run: Path) -> ClipModel:
    """The student of the newest checkpoint of a run that has not finished."""
    for checkpoint in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        if (checkpoint / "student" / DESCRIPTION).exists():
            logger.warning("%s has not finished: reading its newest checkpoint, %s", run, checkpoint.name)
            try:
                return read_model(checkpoint / "student")
            except InputError:
                if checkpoint.exists():
                    raise
                return read_folder(run, str(run))  # the run went on meanwhile
    raise InputError(f"{run}: this run has neither a finished student nor a checkpoint")


def read_file(path: Path) -> ClipModel:
    """The model in a checkpoint file; a file of a model folder stands for its folder."""
    if (path.parent / DESCRIPTION).exists() and path.name in ("model.safetensors", DESCRIPTION):
        return read_model(path.parent)
    from clipdistill.models.open_clip_models import read_checkpoint

    return read_checkpoint(path)


@dataclass(frozen=True)
class Preprocess:
    """The evaluation view of a picture as a model expects it, float (3, size, size), and as `evaluate` prepares it.

    The picture: PIL's, an array (H, W, 3) or tensor (3, H, W) of uint8, a file's bytes, a path. Raises InputError.
    """

    image: ImageSpec

    def __call__(self, picture: Any) -> torch.Tensor:
        try:
            return render(as_picture(picture), EVALUATION_VIEW, self.image)
        except BadSample as error:
            raise InputError(f"preprocess: {error.reason}") from error


def as_model(model: str | Path | nn.Module | ClipModel, device: str | torch.device | None) -> ClipModel:
    """`model` as a ClipModel, where it is; one that is named is loaded onto `device`, frozen."""
    if isinstance(model, str | Path):
        return load_model(model, device=pick_device(device), teacher=True)
    return model if isinstance(model, ClipModel) else clip_model_of(model)


@partial(checked, lent=False)
def load_student(
    path: str | Path | nn.Module, *, device: str | torch.device = "cpu", module: nn.Module | None = None
) -> tuple[nn.Module, Preprocess, Tokenizer]:
    """A model ready for use: (module, frozen and in evaluation mode; preprocess; tokenizer). `path`: any model name.

    device: where its weights go.
    module: filled with the weights of a folder whose model is a module of your own that no registered name builds.

    With the first as `model`, model.encode_image(preprocess(picture)[None]) and model.encode_text(tokenizer(["a cat"]))
    give (1, embed_dim), not normalised. Returns the three; raises InputError as `load_model`.
    """
    with offering(module):
        model = load_model(path, device=device, teacher=True)
    return model.module, Preprocess(model.image), model.tokenizer
