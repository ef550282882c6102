"""`clipdistill list recipes|students|towers|datasets|settings [PATTERN]`: what can be named on the command line."""

from __future__ import annotations

import argparse
import sys

from clipdistill.errors import InputError
from clipdistill.recipes import about, load_recipe, recipe_names
from clipdistill.runtime.console import TextTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to list, and for settings which."""
    parser.add_argument("what", choices=("recipes", "students", "towers", "datasets", "settings"))
    parser.add_argument("pattern", nargs="?", default="", help="settings: only those whose key or meaning holds this")


def run(arguments: argparse.Namespace) -> int:
    """Print one table."""
    if arguments.what == "settings":
        return settings(arguments.pattern)
    if arguments.pattern:
        raise InputError(f"list {arguments.what} takes no pattern ('{arguments.pattern}'): only settings are searched")
    {"recipes": recipes, "students": students, "towers": towers, "datasets": datasets}[arguments.what]().print()
    return 0


def settings(pattern: str) -> int:
    """Every setting, or those that `pattern` finds; 1 when it finds none."""
    from clipdistill.reference.settings import settings as known

    table = TextTable(["setting", "type", "default", "range", "meaning", "command"], text=range(6))
    table.rows += [[row.key, row.kind, row.default, row.range, row.meaning, row.commands] for row in known(pattern)]
    if not table.rows:
        print(f"clipdistill: no setting has '{pattern}' in its name or meaning", file=sys.stderr)
        return 1
    table.print()
    return 0


def recipes() -> TextTable:
    """Every shipped recipe with its terms, source and published figure."""
    table = TextTable(["recipe", "terms and weights", "source", "published"], text=range(4))
    for name in recipe_names():
        weights = load_recipe(name)["objective"]["weights"]
        terms = " + ".join(term if weight == 1 else f"{weight:g} {term}" for term, weight in weights.items())
        known = about(name)
        table.rows.append([name, terms, known.source, known.published])
    return table


def students() -> TextTable:
    """Every registered student with its parameter counts."""
    from clipdistill.models.known import list_students

    heads = ["student", "image", "text transformer", "total", "embedding", "source"]
    table = TextTable(heads, title="students (M parameters)", text=(0, 5))
    for row in list_students():
        counts = (row.image_parameters, row.text_parameters, row.total_parameters)
        table.rows.append([row.name, *(f"{n / 1e6:.2f}" for n in counts), str(row.embed_dim), row.source])
    return table


def towers() -> TextTable:
    """What an image tower and a text tower can be, and the settings of a name that joins them."""
    from clipdistill.models.known import timm_networks
    from clipdistill.models.towers.names import HEADS, POOLINGS, TEXT_KINDS

    table = TextTable(["part", "what"], title="towers:image=...,text=...,key=value", text=(0, 1))
    for name, what in (
        ("image=timm:NETWORK@FILE", f"one of timm's {len(timm_networks())} networks, weights from a .safetensors file"),
        ("image=timm:NETWORK.TAG", "the same with timm's own weights, from the hub or its cache"),
        ("image=clip:MODEL", "the image tower of any model, its projection included: a CLIP, a run, a model folder"),
        ("image=A+B", "towers side by side: their features are concatenated"),
        ("text=hf:FOLDER", f"a text encoder of transformers: {', '.join(TEXT_KINDS)}"),
        ("text=hf:owner/name", "the same from the hub or its cache; sentence-transformers' pooling is read"),
        ("text=clip:MODEL", "the text tower of any model with its tokenizer"),
        ("dim=256", "width of the joint embedding"),
        (f"head={HEADS[0]}", f"{' or '.join(HEADS)}; hidden=1024 units in the mlp"),
        ("size=96", "side of the pictures in pixels (default: the network's own)"),
        ("text_layers=2", "only the first layers of the text encoder"),
        ("pooling=mean", f"{', '.join(POOLINGS)}, instead of what the encoder was trained with"),
        ("context=64", "longest caption in tokens (default: the encoder's own, at most 77)"),
    ):
        table.rows.append([name, what])
    return table


def datasets() -> TextTable:
    """How data sets are named, and the known labelled sets."""
    from clipdistill.data.class_names import KNOWN_SETS

    table = TextTable(["name", "what"], text=(0, 1))
    for name, what in (
        ("captions.json", "Karpathy or COCO captions JSON; its image folder beside it, or given by --image-root"),
        ("pairs.csv, .tsv, .parquet", "one caption a row; columns filepath and title unless named"),
        ("'cc3m/{00000..00331}.tar', folder/", "WebDataset tars in img2dataset's layout, or a folder of images + .txt"),
        ("hf:owner/name", "a Hugging Face data set (extra hf)"),
        ("scenes, scenes:val?size=1000", "the built-in procedural set"),
    ):
        table.rows.append([name, what])
    from clipdistill.data.benchmarks.places import sources

    for name, known in KNOWN_SETS.items():
        bring = f"FOLDER/{name}/val" if sources()[name].layout else f"clipdistill fetch {name}"
        table.rows.append([name, f"labelled: {known} ({bring})"])
    for name, what in (
        ("wds/cars, wds/vtab/dtd, ...", "CLIP_benchmark's sets in its WebDataset layout (clipdistill fetch wds/NAME)"),
        ("sugar_crepe/, winoground/", "captions to be told apart, from the files they are given out in"),
        ("captions.jsonl:de, XTD10/", "Crossmodal-3600 and XTD: retrieval in one language, several (:de+en) or all"),
    ):
        table.rows.append([name, what])
    return table
