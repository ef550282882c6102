"""Prompt templates for zero-shot classification: named sets, or a text or JSON file.

A template is a text with one '{}' for the class name. "imagenet" (the 80 templates of OpenAI's CLIP) and "simple" (7)
are open_clip's; the other sets are this package's own, short ones in their manner. Other published sets are read from
a file: one template a line, or JSON as CLIP_benchmark keeps it, {"cifar10": ["a photo of a {c}.", ...]}, named as
'file.json#cifar10'.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from clipdistill.data.captions import require_legible
from clipdistill.data.class_names import OWN_TEMPLATES
from clipdistill.errors import InputError, nearest
from clipdistill.runtime.files import text_lines

TEMPLATE_SETS = ("imagenet", "simple", *OWN_TEMPLATES)


def templates(name: str) -> tuple[str, ...]:
    """The templates of a named set or file, each with one '{}'.

    Raises InputError for an unknown name, an unreadable file, or a line without exactly one place for the class name.
    """
    if name == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    if name == "simple":
        from open_clip import SIMPLE_IMAGENET_TEMPLATES

        return tuple(template("{}") for template in SIMPLE_IMAGENET_TEMPLATES)
    if name in OWN_TEMPLATES:
        return OWN_TEMPLATES[name]
    file, hash_sign, entry = name.rpartition("#")
    path = Path(file if hash_sign else name)
    if hash_sign or path.suffix in (".txt", ".json") or path.is_file():
        return _read(path, entry if hash_sign else None)
    raise InputError(f"unknown prompt templates '{name}'{nearest(name, TEMPLATE_SETS)}; or give a .txt or .json file")


def check_templates(lines: Iterable[str], where: str) -> tuple[str, ...]:
    """The lines as templates; InputError when one has not exactly one '{}' (CLIP_benchmark: '{c}'), or none is left."""
    result = []
    for number, line in enumerate([lines] if isinstance(lines, str) else lines, start=1):
        text = str(line).strip().replace("{c}", "{}")
        if not text or text.startswith("#"):
            continue
        require_legible(text, f"{where}, template {number}")
        if text.count("{}") != 1 or text.replace("{}", "").count("{") or text.replace("{}", "").count("}"):
            raise InputError(f"{where}, template {number}: '{text}' must hold exactly one {{}} for the class name")
        result.append(text)
    if not result:
        raise InputError(f"{where}: no prompt template in it")
    return tuple(result)


def fill(template: str, name: str) -> str:
    """The prompt for one class name (which may hold braces itself)."""
    return template.replace("{}", name, 1)


def _read(path: Path, entry: str | None) -> tuple[str, ...]:
    from clipdistill.data.files import read_json

    if path.suffix == ".json":
        content = read_json(path)
        if isinstance(content, dict):
            if entry is None:
                raise InputError(
                    f"{path} holds several template sets: name one, for example '{path}#{next(iter(content), '')}'"
                )
            if entry not in content:
                raise InputError(f"{path} has no template set '{entry}'{nearest(entry, content)}")
            content = content[entry]
        if not isinstance(content, list):
            raise InputError(f"{path}: expected a list of templates")
        return check_templates(content, str(path))
    if not path.exists():
        raise InputError(f"prompt templates '{path}': no such file")
    return check_templates(text_lines(path, f"prompt templates '{path}'"), str(path))
