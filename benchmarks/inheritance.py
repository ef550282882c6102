"""Does pruning make a model faster? Dense, masked and pruned, taking turns in one run.

    python benchmarks/inheritance.py [--sparsity 0.5] [--width 256] [--layers 6] [--batch 32] [--rounds 15]

A model with random weights gets random masks at the given sparsity (share of attention and MLP weights), is measured
with them (those of inference), and pruned. Each round times every form once; medians and the spread of the ratio to the
dense model are printed. On a busy machine  --clock cpu --threads 1  compares processor time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from clipdistill.models import ClipModel, build_student, build_words_tokenizer
from clipdistill.models.inheritance.gates import gateable_copy
from clipdistill.models.inheritance.hard_concrete import HIGHEST, LOWEST
from clipdistill.models.inheritance.masks import Masks, prunable
from clipdistill.models.inheritance.parts import transformer_sizes
from clipdistill.models.inheritance.prune import prune
from clipdistill.models.mask_config import MaskConfig

TOWERS = ("image", "text")


def main() -> None:
    """Build, check that the outputs agree, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 256), ("layers", 6), ("batch", 32), ("rounds", 15), ("threads", 1), ("image", 96)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense = model(options)
    masked = gateable_copy(dense, TOWERS)
    masks = Masks(masked.module, MaskConfig(sparsity=options.sparsity, prune_step=1))
    close(masks, options.sparsity)
    pruned = prune(masked, masks)
    images = torch.randn(options.batch, 3, options.image, options.image)
    tokens = dense.tokenizer(["a photograph of a red dog"] * options.batch)
    with masks.acting(sampled=False):
        expected = both(masked, images, tokens)
    found = both(pruned, images, tokens)
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    rows = []
    for tower in TOWERS:
        inputs = images if tower == "image" else tokens
        forms = {
            "dense": lambda t=tower, x=inputs: encode(dense, t, x),
            "masked": lambda t=tower, x=inputs: encode(masked, t, x, masks),
            "pruned": lambda t=tower, x=inputs: encode(pruned, t, x),
        }
        rows += compare(tower, forms, options.rounds, options.batch, clock)
    left = sum(prunable(transformer_sizes(pruned.module, t)) for t in TOWERS)
    whole = sum(prunable(transformer_sizes(dense.module, t)) for t in TOWERS)
    counts = {name: m.parameter_counts()["total"] for name, m in (("dense", dense), ("pruned", pruned))}
    print(f"weights {counts['dense']:,} -> {counts['pruned']:,}; attention and MLP {1 - left / whole:.1%} removed;")
    print(f"largest difference of outputs, masked against pruned: {difference:.1e}")
    for row in rows:
        print(
            f"{row['tower']:<7}{row['form']:<8}{row['rate']:>9.1f}/s  {row['ratio']:.2f}x of dense "
            f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f} over rounds)"
        )
    if options.json is not None:
        options.json.write_text(json.dumps({**vars(options), "json": None, "difference": difference, "rows": rows}))


def model(options: argparse.Namespace) -> ClipModel:
    """A ViT CLIP of the given width and depth, random weights."""
    text = {
        "context_length": 32,
        "vocab_size": 64,
        "width": options.width,
        "heads": options.width // 64,
        "layers": options.layers,
    }
    vision = {"image_size": options.image, "layers": options.layers, "width": options.width, "patch_size": 16}
    architecture = {"embed_dim": options.width, "vision_cfg": vision, "text_cfg": text}
    tokenizer = build_words_tokenizer(["a photograph of a red dog"], 32)
    built = build_student(architecture, seed=0, tokenizer=tokenizer)
    built.module.eval()
    return built


def close(masks: Masks, sparsity: float) -> None:
    """Random masks that close a share of channels, heads and units which makes the wanted sparsity."""
    # two factors make a weight, so each keeps the square root of what shall be left
    share = 1 - math.sqrt(1 - sparsity)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in masks.parameters():
            closed = torch.rand(values.shape, generator=generator).argsort()[: round(share * len(values))]
            values.fill_(HIGHEST)
            values[closed] = LOWEST


@torch.no_grad()
def encode(clip: ClipModel, tower: str, inputs: torch.Tensor, masks: Masks | None = None) -> torch.Tensor:
    """Embeddings of one tower."""
    with nullcontext() if masks is None else masks.acting(sampled=False):
        call: Any = clip.module.encode_image if tower == "image" else clip.module.encode_text
        result: torch.Tensor = call(inputs)
        return result


def both(clip: ClipModel, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of both towers."""
    return encode(clip, "image", images), encode(clip, "text", tokens)


def compare(
    tower: str, forms: dict[str, Callable[[], Any]], rounds: int, batch: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Median rate of each form, and its ratio to the dense one within each round."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 2):
        order = list(forms)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            start = clock()
            forms[name]()
            if number >= 2:  # two rounds of warm-up
                seconds[name].append(clock() - start)
    rows = []
    for name, values in seconds.items():
        ratios = sorted(d / v for d, v in zip(seconds["dense"], values, strict=True))
        rows.append(
            {
                "tower": tower,
                "form": name,
                "rate": batch / statistics.median(values),
                "ratio": statistics.median(ratios),
                "ratio_low": ratios[len(ratios) // 10],
                "ratio_high": ratios[-1 - len(ratios) // 10],
            }
        )
    return rows


if __name__ == "__main__":
    main()
