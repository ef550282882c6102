"""`clipdistill list recipes|students|datasets`: what can be named on the command line."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from clipdistill.recipes import about, load_recipe, recipe_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One word: what to list."""
    parser.add_argument("what", choices=("recipes", "students", "datasets"))


def run(arguments: argparse.Namespace) -> int:
    """Print one table."""
    table = {"recipes": recipes, "students": students, "datasets": datasets}[arguments.what]()
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)
    return 0


def recipes() -> Table:
    """Every shipped recipe with its terms, source and published figure."""
    table = Table("recipe", "terms and weights", "source", "published", title="recipes", show_lines=True)
    for name in recipe_names():
        weights = load_recipe(name)["objective"]["weights"]
        terms = " + ".join(term if weight == 1 else f"{weight:g} {term}" for term, weight in weights.items())
        known = about(name)
        table.add_row(name, terms, known.source, known.published)
    return table


def students() -> Table:
    """Every registered student with its parameter counts."""
    from clipdistill.models.students import list_students

    table = Table(
        "student", "image", "text transformer", "total", "embedding", "source", title="students (M parameters)"
    )
    for row in list_students():
        table.add_row(
            row.name,
            f"{row.image_parameters / 1e6:.2f}",
            f"{row.text_parameters / 1e6:.2f}",
            f"{row.total_parameters / 1e6:.2f}",
            str(row.embed_dim),
            row.source,
        )
    return table


def datasets() -> Table:
    """How data sets are named, and the known labelled sets."""
    from clipdistill.data.class_names import KNOWN_SETS

    table = Table("name", "what", title="data sets")
    for name, what in (
        (
            "captions.json",
            "Karpathy or COCO captions JSON; the image folder is found beside it or given by --image-root",
        ),
        ("pairs.csv, .tsv, .parquet", "one caption a row; columns filepath and title unless named"),
        ("'cc3m/{00000..00331}.tar', folder/", "WebDataset tars in img2dataset's layout, or a folder of images + .txt"),
        ("hf:owner/name", "a Hugging Face data set (extra hf)"),
        ("scenes, scenes:val?size=1000", "the built-in procedural set"),
    ):
        table.add_row(name, what)
    for name, known in KNOWN_SETS.items():
        table.add_row(name, f"labelled: {known}")
    return table
