"""A meta-teacher: a frozen CLIP and the network that fuses its region and token embeddings; kept in one folder.

meta_teacher.json, meta_teacher.safetensors     settings and weights of the network
clip/                                           the frozen CLIP, an ordinary model folder
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clipdistill.config import as_dict, build
from clipdistill.errors import InputError
from clipdistill.models.architecture import text_tower
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.save import made_here, read_model, read_safetensors, save_model
from clipdistill.regions.network import MetaTeacherNetwork
from clipdistill.regions.store import RegionBatch
from clipdistill.runtime.files import new_folder, read_json, sha256, write_json
from clipdistill.train.region_config import MetaTeacherConfig

FORMAT = 1
DESCRIPTION, WEIGHTS, CLIP = "meta_teacher.json", "meta_teacher.safetensors", "clip"


@dataclass
class MetaTeacher:
    """The frozen `clip` and the trained `network`; embeddings have the width of the CLIP."""

    name: str
    clip: ClipModel
    network: MetaTeacherNetwork

    @classmethod
    def start(cls, clip: ClipModel, config: MetaTeacherConfig, seed: int = 0) -> MetaTeacher:
        """An untrained network on a frozen CLIP; the same weights for the same seed, whatever ran before."""
        clip.module.eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = MetaTeacherNetwork(clip.embed_dim, config)
        return cls(f"regions of {clip.name}", clip, network)

    @property
    def config(self) -> MetaTeacherConfig:
        return self.network.config

    def to(self, device: torch.device | str) -> MetaTeacher:
        self.clip.module.to(device)
        self.network.to(device)
        return self

    def text(self, captions: Sequence[str] | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the frozen CLIP, whose text tower must be a transformer, makes of captions or their token ids (B, L).

        Returns the sentence embedding (B, D), the token embeddings (B, L, D) (last hidden states through the text
        projection; none is normalised) and the mask (B, L) of the caption's own tokens, without start and end.
        """
        module: Any = self.clip.module
        tokens = captions if isinstance(captions, Tensor) else self.clip.tokenizer(list(captions))
        tokens = tokens.to(module.logit_scale.device)
        tower = text_tower(module)
        norm = getattr(tower, "ln_final", None)
        if not isinstance(norm, nn.Module):
            raise InputError(f"a region teacher needs the tokens of a text transformer, found {type(tower).__name__}")
        seen: list[Tensor] = []
        handle = norm.register_forward_hook(lambda part, given, output: seen.append(output))
        try:
            sentence = module.encode_text(tokens)
        finally:
            handle.remove()
        states = seen[-1]
        if states.ndim != 3:
            raise InputError("a region teacher needs the state of every token, and this text tower keeps only one")
        states = _project(states, getattr(tower, "text_projection", None))
        ends = tokens.argmax(dim=1, keepdim=True)  # the end token has the largest id
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return sentence, states, (places > 0) & (places < ends)

    def image(self, regions: RegionBatch, states: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Image embeddings (B, D), not normalised, from regions and (in the published form) the caption's tokens."""
        return self.network(regions.embeddings, regions.mask, regions.areas, regions.confidences, states, mask)

    def save(self, folder: Path) -> None:
        """Write the folder, whole or not at all; one that is there is replaced if it is a meta-teacher's."""
        with new_folder(folder, lambda there: (there / DESCRIPTION).exists(), "region teacher", _made) as new:
            save_model(self.clip, new / CLIP)
            tensors = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
            save_file(tensors, new / WEIGHTS)
            described = {
                "format": FORMAT,
                "name": self.name,
                "settings": as_dict(self.config),
                "width": self.clip.embed_dim,
                "weights_sha256": sha256(new / WEIGHTS),
                "clip_weights_sha256": sha256(new / CLIP / "model.safetensors"),
            }
            write_json(new / DESCRIPTION, described, checked=True)


def _made(part: Path) -> bool:
    return str(part) in (DESCRIPTION, WEIGHTS, CLIP) or (part.parts[0] == CLIP and made_here(Path(part.name)))


def region_teacher_folder(name: str) -> Path | None:
    """The folder of the region teacher that `name` names (itself, or the run that trained it), else None."""
    path = Path(name).expanduser()
    return next((f for f in (path, path / "student") if (f / DESCRIPTION).is_file()), None)


def read_meta_teacher(folder: Path) -> MetaTeacher:
    """The frozen meta-teacher in a folder, in evaluation mode. Raises InputError for what is damaged or another one."""
    where = folder / DESCRIPTION
    values = read_json(where, "copy the folder again")
    if values.get("format") != FORMAT:
        raise InputError(f"{where}: format {values.get('format')!r} is not known here (this version reads {FORMAT})")
    config = build(MetaTeacherConfig, values.get("settings", {}), f"{where}: settings")
    clip = read_model(folder / CLIP)
    network = MetaTeacherNetwork(clip.embed_dim, config)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    tensors = read_safetensors(folder / WEIGHTS, shapes, f"the settings in {DESCRIPTION}")
    if sha256(folder / WEIGHTS) != values.get("weights_sha256"):
        raise InputError(f"{folder / WEIGHTS}: the content is not what {DESCRIPTION} recorded: copy the folder again")
    if sha256(folder / CLIP / "model.safetensors") != values.get("clip_weights_sha256"):
        raise InputError(
            f"{folder / CLIP}: another CLIP than the one this teacher was trained on: copy the folder again"
        )
    network.load_state_dict(tensors)
    network.requires_grad_(False).eval()
    clip.module.requires_grad_(False).eval()
    return MetaTeacher(str(values.get("name", folder.name)), clip, network)


def _project(states: Tensor, projection: Any) -> Tensor:
    if projection is None:
        return states
    return projection(states) if isinstance(projection, nn.Module) else states @ projection
