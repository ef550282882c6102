"""The same model at another image resolution: position embeddings interpolated, all other weights kept."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from clipdistill.data.views import ImageSpec
from clipdistill.errors import InputError
from clipdistill.models.architecture import JOINED, build_module, check_architecture
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.weights import resize_positions


def with_image_size(model: ClipModel, size: int) -> ClipModel:
    """`model` for square images of `size` pixels, on the CPU; the model itself when that is its size already.

    Vision transformers and CLIP's ResNets get their position embeddings interpolated (bicubic, antialiased; open_clip's
    rule), timm networks by timm's own rule. Raises InputError for a size that the network cannot take.
    """
    if size == model.image.size:
        return model
    if JOINED in model.architecture:
        return _joined_at(model, size)
    if "vision_cfg" not in model.architecture:
        raise InputError(f"'{model.name}': its image size, {model.image.size}, is fixed, so it cannot be {size}")
    values = copy.deepcopy(model.architecture)
    values["vision_cfg"]["image_size"] = size
    architecture = check_architecture(values, f"{model.name} at {size} pixels")
    visual: Any = model.module.visual
    if hasattr(visual, "trunk"):
        module = copy.deepcopy(model.module).cpu()
        try:
            set_input_size: Any = module.get_submodule("visual").set_input_size
            set_input_size(size)
        except Exception as error:  # timm's networks assert
            raise InputError(f"{model.name}: this image tower cannot take images of {size} pixels ({error})") from error
    else:
        patch = visual.patch_size[0] if hasattr(visual, "patch_size") else 32
        if size % patch:
            raise InputError(
                f"{model.name}: an image of {size} pixels is not a whole number of its {patch}-pixel patches"
            )
        tensors = {name: tensor.cpu() for name, tensor in model.module.state_dict().items()}
        resize_positions(tensors, (size // patch, size // patch))
        module = build_module(architecture)
        module.load_state_dict(tensors)
    image = ImageSpec(**{**model.image.model_dump(), "size": size})
    return dataclasses.replace(model, module=module, image=image, architecture=architecture)


def _joined_at(model: ClipModel, size: int) -> ClipModel:
    """Joined towers, every image network at `size`: for networks whose weights do not depend on it."""
    values = copy.deepcopy(model.architecture)
    if any("clip" in trunk for trunk in values[JOINED]["image"]["trunks"]):
        raise InputError(f"{model.name}: holds a CLIP's image tower: name the towers with  size={size}  instead")
    for part in (values[JOINED]["image"], *values[JOINED]["image"]["trunks"]):
        part["size"] = size
    module = build_module(check_architecture(values, f"{model.name} at {size} pixels"))
    tensors = {name: tensor.cpu() for name, tensor in model.module.state_dict().items()}
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in module.state_dict().items()}:
        raise InputError(f"{model.name}: its weights are for its own size: name the towers with  size={size}  instead")
    module.load_state_dict(tensors)
    image = ImageSpec(**{**model.image.model_dump(), "size": size})
    return dataclasses.replace(model, module=module, image=image, architecture=values)
