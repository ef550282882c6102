"""What a store's numbers depend on, taken from a teacher and this machine, and compared field by field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from clipdistill.cache.manifest import Manifest, TeacherEntry
from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel, hash_tensors

if TYPE_CHECKING:
    from clipdistill.embed.encode import Encoder

LIBRARIES = ("torch", "pillow", "open_clip_torch", "timm", "transformers", "onnxruntime")
_ALWAYS = ("torch", "pillow", "open_clip_torch", "timm")


def weights_digest(model: ClipModel) -> str:
    """sha256 over the architecture and all weights: what the forward pass computes, whatever the model is called."""
    own = getattr(model.module, "weights_sha256", None)  # an exported graph has no state dictionary
    if isinstance(own, str):
        return own
    digest = hashlib.sha256(json.dumps(model.architecture, sort_keys=True).encode())
    hash_tensors(model.module.state_dict(), digest)
    return digest.hexdigest()


def tokenizer_text(model: ClipModel) -> str:
    """The content of tokenizer.json."""
    return json.dumps(model.tokenizer.to_dict(), sort_keys=True, ensure_ascii=False) + "\n"


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def teacher_entry(model: ClipModel, name: str, precision: str, encoder: Encoder | None = None) -> TeacherEntry:
    """The manifest's entry for a loaded teacher, with what runs its towers in `encoder`."""
    engines = {} if encoder is None else encoder.engines
    towers: Any = model.module
    return TeacherEntry(
        name=name,
        weights=weights_digest(model),
        transform=model.image,
        tokenizer=text_digest(tokenizer_text(model)),
        precision=precision,
        dim=model.embed_dim,
        logit_scale=float(towers.logit_scale.detach().float().exp()),
        parameters=model.parameter_counts() if hasattr(model.module, "visual") else {},
        engines={tower: engine.name for tower, engine in engines.items() if engine.name != "torch"},
        agreement={tower: engine.agreement for tower, engine in engines.items() if engine.agreement is not None},
    )


def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of the libraries a teacher called like this runs through."""
    wanted = list(_ALWAYS)
    wanted += ["transformers"] if any(name.startswith("hf:") for name in names) else []
    wanted += ["onnxruntime"] if any(name.startswith("onnx:") for name in names) else []
    found = {}
    for library in wanted:
        try:
            found[library] = metadata.version(library).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def version_differences(stored: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """'torch 2.6 -> 2.7' for each library whose first two numbers differ; a patch release changes no numbers."""
    return [
        f"{library} {stored[library]} -> {here[library]}"
        for library in sorted({*stored} & {*here})
        if stored[library].split(".")[:2] != here[library].split(".")[:2]
    ]


def require_versions(manifest: Manifest, where: str, allowed: bool, option: str) -> None:
    """Raises InputError for a library whose version differs from the one that filled the store, unless allowed."""
    names = tuple(teacher.name for teacher in manifest.teachers)
    different = version_differences(manifest.versions, library_versions(names))
    if different and not allowed:
        raise InputError(
            f"{where}: versions: the library versions differ from those that filled it ({', '.join(different)}), which "
            f"can change the numbers: use the same versions, or accept the difference with {option}"
        )


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """'transform.size: 224 -> 336' for every value that differs between two nested mappings."""
    for key in stored:
        before, after = stored[key], wanted.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def require_same_teacher(stored: TeacherEntry, found: TeacherEntry, where: str) -> None:
    """Raises InputError that names the first field in which a loaded teacher is not the stored one."""
    first = next(differences(stored.identity(), found.identity()), None)
    if first is not None:
        raise InputError(
            f"{where}: teacher '{stored.name}': {first}: the cache was made with another one, so its embeddings do not "
            "apply; fill a new cache"
        )
