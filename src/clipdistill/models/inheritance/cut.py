"""Manual weight inheritance (TinyCLIP, ICCV 2023): a student cut out of its teacher.

Layers, channels, heads, MLP units and embedding dimensions of the student are a selection of the teacher's, so its
weights are the teacher's own. The released rules are the defaults: of L_T layers take 0, s, 2 s, ... with s =
floor(L_T / L_S), which for 12 -> 9 is the first nine; of everything else take the leading part. `depth="even"` spaces
the layers evenly from the first to the last, and `channels="importance"` takes the parts with the largest weights
(importance.py) instead of the first ones.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.errors import InputError
from clipdistill.models.architecture import build_module, check_architecture
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.inheritance import importance
from clipdistill.models.inheritance.parts import (
    KeptBlock,
    KeptResNet,
    KeptTransformer,
    ResNetSizes,
    TransformerSizes,
    cut,
    tower_sizes,
)
from clipdistill.models.inherited import PREFIX, Inheritance, TowerSizes, parse
from clipdistill.models.known import BLOCK_SIZES

Sizes = TransformerSizes | ResNetSizes


def inherit(teacher: ClipModel, wanted: Inheritance | str, *, seed: int = 0) -> ClipModel:
    """The student that `wanted` describes (see models/inherited.py), with weights from `teacher`; on the CPU, fp32.

    All layers and widths give a model equal to the teacher to the bit. Tokenizer, image size, patch size, activation
    and logit scale are the teacher's. `seed` is for `weights=random`, a student that inherits the sizes alone. Raises
    InputError for sizes above the teacher's and for towers that cannot be cut.
    """
    if isinstance(wanted, str):
        wanted = parse(wanted if wanted.startswith(PREFIX) else PREFIX + wanted)
    architecture, towers = inherited_architecture(teacher.architecture, wanted)
    state = {name: tensor.detach().cpu() for name, tensor in teacher.module.state_dict().items()}
    rank = wanted.channels == "importance"
    image = None if towers["image"] is None else _keep(state, "image", *towers["image"], wanted.depth, rank)
    text = None if towers["text"] is None else _keep(state, "text", *towers["text"], wanted.depth, rank)
    assert not isinstance(text, KeptResNet)
    embed = architecture["embed_dim"]
    # only towers that can both be cut have an embedding to choose from
    fewer = rank and embed < teacher.embed_dim
    embedding = _choose(embed, fewer, importance.embedding_scores, *(_projections(teacher.module) if fewer else ()))
    module = build_module(architecture, seed=seed)
    if wanted.weights == "inherited":
        module.load_state_dict(cut(state, list(module.state_dict()), image, text, embedding))
    return dataclasses.replace(
        teacher, name=f"{PREFIX}{wanted.name}", module=module, embed_dim=embed, architecture=architecture
    )


def kept_layers(teacher: int, student: int, depth: str) -> tuple[int, ...]:
    """Which of `teacher` layers make a student of `student` layers, by the rule `depth` (released or even)."""
    if depth == "released":
        return tuple(range(0, teacher, teacher // student))[:student]
    if student == 1:
        return (0,)
    # rounded half up, so that the choice does not depend on Python's rounding to even
    return tuple((2 * i * (teacher - 1) + student - 1) // (2 * (student - 1)) for i in range(student))


def inherited_architecture(
    teacher: Mapping[str, Any], wanted: Inheritance
) -> tuple[dict[str, Any], dict[str, tuple[Sizes, Sizes] | None]]:
    """(the student's architecture, for each tower its (teacher's, student's) sizes or None where it is taken whole).

    Needs no weights. Raises InputError as `inherit`.
    """
    module = build_module(teacher, device="meta")
    result = copy.deepcopy(dict(teacher))
    label = f"'{PREFIX}{wanted.name}'"
    _require_patch(teacher["vision_cfg"], wanted.patch_size, label)
    embed = wanted.embed or teacher["embed_dim"]
    if embed > teacher["embed_dim"]:
        raise InputError(f"{label}: embedding {embed} is more than the teacher's {teacher['embed_dim']}")
    towers: dict[str, tuple[Sizes, Sizes] | None] = {}
    for tower, asked in (("image", wanted.image), ("text", wanted.text)):
        sizes = tower_sizes(module, tower, teacher)
        if sizes is None:
            if not asked.whole or embed != teacher["embed_dim"]:
                raise InputError(
                    f"{label}: the teacher's {tower} tower is no plain open_clip transformer or ResNet, so it can only "
                    f"be taken whole: leave its sizes and the embedding ({teacher['embed_dim']}) as they are"
                )
            towers[tower] = None
            continue
        where = f"{label}: {tower} tower"
        if tower == "text" and getattr(getattr(module, "text", module), "text_projection", None) is None:
            raise InputError(f"{where}: the teacher has no projection after it, so its width cannot change")
        if isinstance(sizes, ResNetSizes):
            smaller: Sizes = _smaller_resnet(sizes, asked, where)
            result["vision_cfg"] |= {"width": smaller.width, "layers": list(smaller.layers)}  # type: ignore[arg-type]
        else:
            smaller = _smaller_transformer(sizes, asked, wanted.depth, where)
            write_sizes(result, tower, smaller)
        towers[tower] = (sizes, smaller)
    result["embed_dim"] = embed
    return check_architecture(result, label), towers


def write_sizes(architecture: dict[str, Any], tower: str, sizes: TransformerSizes) -> None:
    """Put the sizes of a transformer tower into an architecture: open_clip's own keys where it can express them."""
    config = architecture["vision_cfg" if tower == "image" else "text_cfg"]
    config |= {"layers": sizes.layers, "width": sizes.width}
    blocks: dict[str, Any] = architecture.get(BLOCK_SIZES, {})
    blocks.pop(tower, None)
    ratio = sizes.units[0] / sizes.width
    plain = (
        all(n * sizes.head_width == sizes.width for n in sizes.heads)
        and len(set(sizes.units)) == 1
        and ratio > 0
        and int(sizes.width * ratio) == sizes.units[0]
    )
    if plain:
        config["mlp_ratio"] = ratio
        config |= {"head_width": sizes.head_width} if tower == "image" else {"heads": sizes.heads[0]}
    else:
        blocks[tower] = {"head_width": sizes.head_width, "heads": list(sizes.heads), "mlp": list(sizes.units)}
    architecture.pop(BLOCK_SIZES, None)
    if blocks:
        architecture[BLOCK_SIZES] = blocks


def _require_patch(config: Mapping[str, Any], wanted: int | None, label: str) -> None:
    own = config.get("patch_size", 16)
    plain = isinstance(config.get("layers", 12), int) and not config.get("timm_model_name")
    if wanted is not None and plain and wanted != own:
        raise InputError(
            f"{label}: made of {wanted}-pixel patches, and the teacher reads {own}-pixel ones: inherit from a teacher "
            f"with {wanted}-pixel patches"
        )


def _smaller_transformer(sizes: TransformerSizes, asked: TowerSizes, depth: str, where: str) -> TransformerSizes:
    """The student's sizes in a transformer tower; raises InputError where the teacher has not as much."""
    if isinstance(asked.layers, tuple):
        written = "-".join(map(str, asked.layers))
        raise InputError(f"{where}: the teacher's is a transformer, which has one number of layers, not {written}")
    layers, width = asked.layers or sizes.layers, asked.width or sizes.width
    _at_most(layers, sizes.layers, "layers", where)
    _at_most(width, sizes.width, "channels", where)
    sources = kept_layers(sizes.layers, layers, depth)
    heads = tuple(sizes.heads[i] for i in sources)
    units = tuple(sizes.units[i] for i in sources)
    # where the teacher's heads and MLP follow its width, so do the student's; a pruned teacher's layers keep their own
    uniform = all(n * sizes.head_width == sizes.width for n in sizes.heads)
    if asked.heads is not None:
        _at_most(asked.heads, min(heads), "heads", where)
        heads = (asked.heads,) * layers
    elif uniform and width != sizes.width:
        if width % sizes.head_width:
            raise InputError(
                f"{where}: {width} channels are no multiple of the head width {sizes.head_width}: choose a multiple, "
                "or give the number of heads too"
            )
        heads = (width // sizes.head_width,) * layers
    if asked.mlp is not None:
        _at_most(asked.mlp, min(units), "MLP units", where)
        units = (asked.mlp,) * layers
    elif uniform and width != sizes.width:
        units = tuple(n * width // sizes.width for n in units)
    return TransformerSizes(width, sizes.head_width, heads, units)


def _smaller_resnet(sizes: ResNetSizes, asked: TowerSizes, where: str) -> ResNetSizes:
    if asked.heads is not None or asked.mlp is not None:
        raise InputError(f"{where}: the teacher's is a ResNet, whose sizes are layers (such as 3-4-6-3) and width")
    layers = sizes.layers if asked.layers is None else asked.layers
    if isinstance(layers, int) or len(layers) != len(sizes.layers):
        raise InputError(f"{where}: the teacher's is a ResNet of {len(sizes.layers)} stages: write layers as 3-4-6-3")
    for own, wanted in zip(sizes.layers, layers, strict=True):
        _at_most(wanted, own, "blocks in a stage", where)
    width = asked.width or sizes.width
    _at_most(width, sizes.width, "channels", where)
    if width % 2 or width * 32 % sizes.head_width:
        raise InputError(f"{where}: a ResNet's width must be even and make whole heads; {width} does not")
    return ResNetSizes(width, tuple(layers), sizes.head_width)


def _at_most(wanted: int, own: int, what: str, where: str) -> None:
    if wanted > own:
        raise InputError(f"{where}: {wanted} {what} asked for, and the teacher has {own}: it can give no more")


def _keep(
    state: Mapping[str, Tensor], tower: str, larger: Sizes, smaller: Sizes, depth: str, rank: bool
) -> KeptTransformer | KeptResNet:
    """The selection that makes `smaller` out of `larger`: leading parts, or the most important ones with `rank`."""
    if isinstance(larger, ResNetSizes):
        assert isinstance(smaller, ResNetSizes)
        return _keep_resnet(state, larger, smaller, depth, rank)
    assert isinstance(smaller, TransformerSizes)
    flat = "transformer." if "transformer.resblocks.0.ln_1.weight" in state else "text.transformer."
    prefix = "visual.transformer." if tower == "image" else flat
    layers = kept_layers(larger.layers, smaller.layers, depth)
    return KeptTransformer(
        head_width=larger.head_width,
        channels=_choose(smaller.width, rank, importance.channel_scores, state, prefix, larger),
        layers=layers,
        heads=tuple(
            _choose(n, rank, importance.head_scores, state, prefix, i, larger)
            for i, n in zip(layers, smaller.heads, strict=True)
        ),
        units=tuple(
            _choose(n, rank, importance.unit_scores, state, prefix, i)
            for i, n in zip(layers, smaller.units, strict=True)
        ),
    )


def _keep_resnet(
    state: Mapping[str, Tensor], larger: ResNetSizes, smaller: ResNetSizes, depth: str, rank: bool
) -> KeptResNet:
    half = smaller.width // 2

    def by_gain(count: int, name: str) -> Tensor:
        return _choose(count, rank, importance.gains, state, name)

    blocks = []
    for stage, (own, wanted) in enumerate(zip(larger.layers, smaller.layers, strict=True)):
        inner = smaller.width << stage
        sources = [(i, f"visual.layer{stage + 1}.{i}") for i in kept_layers(own, wanted, depth)]
        kept = [KeptBlock(i, by_gain(inner, f"{name}.bn1"), by_gain(inner, f"{name}.bn2")) for i, name in sources]
        blocks.append(tuple(kept))
    return KeptResNet(
        head_width=larger.head_width,
        stem=(by_gain(half, "visual.bn1"), by_gain(half, "visual.bn2"), by_gain(smaller.width, "visual.bn3")),
        streams=tuple(
            _choose(4 * smaller.width << s, rank, importance.stream_scores, state, s, larger)
            for s in range(len(larger.layers))
        ),
        blocks=tuple(blocks),
        heads=_choose(smaller.heads, rank, importance.pooling_head_scores, state, larger),
    )


def _projections(module: nn.Module) -> tuple[Tensor, Tensor]:
    """The image and the text projection, (inputs, embedding) each, of a model whose towers can both be cut."""
    visual: Any = module.visual
    text: Any = getattr(module, "text", module).text_projection
    image = visual.proj if hasattr(visual, "proj") else visual.attnpool.c_proj.weight.T
    return image.detach(), (text.weight.T if isinstance(text, nn.Linear) else text).detach()


def _choose(count: int, rank: bool, scores: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return importance.top(scores(*arguments), count) if rank else torch.arange(count)
