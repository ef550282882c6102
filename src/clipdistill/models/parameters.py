"""Which parameters train and how: freezing by tower or name, and the parameter groups of the optimiser."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from clipdistill.errors import InputError, nearest
from clipdistill.models.known import TOWERS, near

_JOINED_HEADS = ("visual.head.", "text.head.")
_SCALES = ("logit_scale", "logit_bias")


def tower_of(name: str) -> str:
    """'image', 'text' or 'scale': the part of an open_clip model that owns the parameter called `name`."""
    if name.startswith("visual."):
        return "image"
    return "scale" if name in _SCALES else "text"


def freeze(module: nn.Module, patterns: Sequence[str]) -> int:
    """Stop the parameters that `patterns` name from training; returns how many numbers are frozen in all.

    A pattern is 'image' or 'text' (a whole tower), the name of a parameter or of a part ('visual.conv1'), or one with
    wildcards ('visual.transformer.resblocks.[0-5].*'). Raises InputError for a pattern that names nothing, and when
    nothing is left to train.
    """
    parameters = dict(module.named_parameters())
    for pattern in patterns:
        if pattern in TOWERS and not hasattr(module, "visual"):
            raise InputError(
                f"freeze: '{pattern}' is a tower of open_clip's models; name this module's own parts, such as "
                f"'{next(iter(parameters)).split('.')[0]}'"
            )
        matched = [name for name in parameters if _matches(pattern, name)]
        if not matched:
            parts = {name.rsplit(".", depth)[0] for name in parameters for depth in (1, 2, 3)}
            hint = nearest(pattern, TOWERS) if len(pattern) < 8 else near(pattern, parts)
            raise InputError(f"freeze: no parameter is called '{pattern}'{hint}")
        for name in matched:
            parameters[name].requires_grad_(False)
    if patterns and not any(p.requires_grad for p in parameters.values()):
        raise InputError(f"freeze: {', '.join(patterns)} freezes the whole model, so there is nothing to train")
    return sum(p.numel() for p in parameters.values() if not p.requires_grad)


def _matches(pattern: str, name: str) -> bool:
    if pattern in TOWERS:
        return tower_of(name) == pattern
    return name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)


def lock(module: nn.Module, tower: str, groups: int) -> int:
    """Lock a tower but for its last `groups` layer groups; returns how many of its numbers are frozen.

    Groups are timm's own for its networks, blocks of a transformer or stages of a ResNet else; a CLIP's projection and
    final norm are a group. The heads of joined towers are new, so they always train. Raises InputError for a module
    without towers and when more groups are to train than there are.
    """
    if not hasattr(module, "visual"):
        raise InputError(f"train.lock_{tower}: this module has no towers to lock: name its parts in train.freeze")
    depths = {
        name: depth
        for name, depth in _depths(module).items()
        if tower_of(name) == tower and not is_new_head(module, name)
    }
    order = sorted(set(depths.values()))
    if groups >= len(order):
        raise InputError(
            f"train.lock_{tower}={groups}: the {tower} tower has {len(order)} groups: give a smaller number, or none"
        )
    kept = set(order[len(order) - groups :])
    frozen = 0
    for name, parameter in module.named_parameters():
        if name in depths and depths[name] not in kept:
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    module.train(module.training)  # a locked tower of joined ones goes into evaluation mode
    return frozen


def is_joined(module: nn.Module) -> bool:
    """Whether the module is a pair of joined towers (models/towers), whose heads start from nothing."""
    return hasattr(getattr(module, "visual", None), "trunks")


def is_new_head(module: nn.Module, name: str) -> bool:
    """Whether the parameter called `name` belongs to the new head of a joined tower."""
    return is_joined(module) and name.startswith(_JOINED_HEADS)


def checkpoint_gradients(module: nn.Module) -> None:
    """Have the towers' blocks compute their activations again in the backward pass instead of keeping them.

    Raises InputError where no part can, and for batch normalisations, whose running statistics would move twice.
    """
    moving = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    if moving:
        raise InputError(
            f"train.grad_checkpointing: the second pass would move the running statistics of {len(moving)} batch "
            "normalisations twice; set train.batch_statistics=frozen"
        )
    parts: list[Any] = list(module.modules())
    for part in parts:
        with contextlib.suppress(AssertionError, NotImplementedError, ValueError):  # parts that cannot
            if hasattr(part, "set_grad_checkpointing"):  # open_clip, timm
                part.set_grad_checkpointing(True)
            elif hasattr(part, "gradient_checkpointing_enable"):  # transformers
                part.gradient_checkpointing_enable({"use_reentrant": False})
    flags = ("grad_checkpointing", "gradient_checkpointing")
    if not any(getattr(part, flag, False) is True for part in parts for flag in flags):
        raise InputError("train.grad_checkpointing: no part of the student can compute its activations again")


def freeze_statistics(module: nn.Module) -> int:
    """Keep the running statistics of all batch normalisations, trained or not; returns how many layers have them."""
    layers = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for part in layers:
        part.statistics_frozen = True  # type: ignore[assignment]
    return len(layers)


def hold_frozen_statistics(module: nn.Module) -> nn.Module:
    """Put batch normalisations that are frozen, or all of whose parameters are, into evaluation mode.

    Call it after `module.train()`.

    A frozen network whose running statistics go on moving is not frozen: its outputs drift with the training data.
    """
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            parameters = list(part.parameters(recurse=False))
            locked = parameters and not any(p.requires_grad for p in parameters)
            if locked or getattr(part, "statistics_frozen", False):
                part.eval()
    return module


@contextlib.contextmanager
def evaluation_mode(module: Any) -> Iterator[None]:
    """Within, the module is in evaluation mode; afterwards each part is as it was, held batch statistics included."""
    training = [part for part in module.modules() if part.training] if isinstance(module, nn.Module) else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies, by open_clip's rule: matrices and kernels only; no norms, biases or logit scale.

    Position embeddings and token embeddings are matrices and do decay, as they do in open_clip.
    """
    return parameter.ndim >= 2 and not any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


def parameter_groups(
    module: nn.Module,
    *,
    weight_decay: float,
    learning_rate: float,
    layer_decay: float | None = None,
    tower_rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for a torch optimiser over the trainable parameters: {"name", "params", "weight_decay", "lr"}.

    Two groups, decayed and not (see `decays`). With `layer_decay` d in (0, 1], one pair per depth of each tower: the
    learning rate of a layer k steps below the output of its tower is learning_rate * d**k; the logit scale has the full
    rate. `tower_rates`: factors of the rate by tower ("image", "text"); the new heads of joined towers keep the full
    one.
    """
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise InputError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
    below = _layers_below_output(module) if layer_decay is not None else None
    rates = tower_rates or {}
    groups: dict[tuple[int, str, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = below(name) if below is not None else 0
        decayed = decays(name, parameter)
        factor = 1.0 if is_new_head(module, name) else rates.get(tower_of(name), 1.0)
        tower = "" if factor == 1.0 else tower_of(name)
        group = groups.setdefault(
            (depth, tower, not decayed),
            {
                "name": ("decay" if decayed else "no decay")
                + (f", {tower}" if tower else "")
                + (f", {depth} below output" if depth else ""),
                "params": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr": learning_rate * factor * (layer_decay or 1.0) ** depth,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _layers_below_output(module: nn.Module) -> Callable[[str], int]:
    """A function from parameter name to its number of layers below its tower's output."""
    depth = _depths(module)
    deepest = {
        tower: max((d for n, d in depth.items() if tower_of(n) == tower and d < _OUTPUT), default=0) for tower in TOWERS
    }

    def below(name: str) -> int:
        tower = tower_of(name)
        if tower == "scale" or depth[name] >= _OUTPUT:
            return 0
        return deepest[tower] + 1 - depth[name]

    return below


def _depths(module: nn.Module) -> dict[str, int]:
    """Depth of every parameter: 0 for the input (stem, embeddings), 1... for the blocks, _OUTPUT for what follows them.

    Towers side by side, of depths of their own, are counted back from their output, so that they meet there.
    """
    depths = {name: _depth(name) for name, _ in module.named_parameters()} | _timm_depths(module)
    for number in range(len(getattr(getattr(module, "visual", None), "trunks", ()))):
        own = {n: depth for n, depth in depths.items() if n.startswith(f"visual.trunks.{number}.")}
        last = max((depth for depth in own.values() if depth < _OUTPUT), default=0) + (_OUTPUT in own.values())
        depths |= {n: (last if depth >= _OUTPUT else depth) - last + _MEETING for n, depth in own.items()}
    return depths


_MEETING = 1000
_OUTPUT = 1_000_000
_BLOCK = re.compile(r"(?:resblocks|block|layers?)\.(\d+)\.")
_RESNET_STAGE = re.compile(r"^visual\.(?:trunks\.\d+\.)?layer(\d)\.")
_OUTPUT_PARTS = re.compile(
    r"(^|\.)(ln_post|proj|attn_pool\w*|attnpool|ln_final|final_layer_norm|text_projection|head|cls_emb|text_decoder)(\.|$)"
)


def _depth(name: str) -> int:
    stage = _RESNET_STAGE.match(name)
    if stage:
        return int(stage.group(1))
    block = _BLOCK.search(name)
    if block and not name.startswith("text_decoder"):
        return int(block.group(1)) + 1
    return _OUTPUT if _OUTPUT_PARTS.search(name) else 0


def _timm_depths(module: nn.Module) -> dict[str, int]:
    """Depths inside timm networks, by the grouping that timm defines for each."""
    depths: dict[str, int] = {}
    found: list[str] = []
    for prefix, part in module.named_modules():
        if prefix.startswith("visual.") and hasattr(part, "group_matcher") and not prefix.startswith(tuple(found)):
            from timm.models import group_parameters

            found.append(f"{prefix}.")
            groups = group_parameters(part, part.group_matcher(coarse=False))
            depths |= {f"{prefix}.{name}": int(layer) for layer, names in groups.items() for name in names}
    return depths
