"""Encoding captions and pictures against eager towers at the full context, in turns, in one call.

    python benchmarks/encode.py --data captions.json [--model ViT-B-16] [--captions 500] [--pictures 64] [--quick]

The model has random weights: speed does not depend on them. `full context` is `encode_text` on batches of all tokens,
the captions as they come; `cut` cuts each batch to its longest caption (ClipModel.shorten); `cut and sorted` is what
`clipdistill` does everywhere (embed.encode.Encoder). Pictures: the tower on prepared images, and the encoder from 8-bit
pixels. Ratios are medians over rounds with their least and greatest; differences are those of unit rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import DataConfig, PairSource, one_or_several
from clipdistill.data.views import EVALUATION_VIEW, normalise, render_pixels
from clipdistill.embed.encode import Encoder
from clipdistill.models import ClipModel, build_student


def in_turn(ways: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, Any]:
    """Seconds of each way, its ratio to the first, and the largest difference of its rows from the first's."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rows: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            with torch.no_grad():
                rows[name] = way()
            seconds[name].append(time.perf_counter() - began)
    first = next(iter(ways))
    found = {}
    for name, values in seconds.items():
        ratios = [plain / own for plain, own in zip(seconds[first], values)]
        found[name] = {
            "seconds": statistics.median(values),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "greatest": max(ratios),
            "difference": float((rows[name] - rows[first]).norm(dim=-1).max()),
        }
    return found


def unit(rows: list[Tensor]) -> Tensor:
    return torch.nn.functional.normalize(torch.cat(rows).float(), dim=-1)


def text_ways(model: ClipModel, captions: list[str], batch: int) -> dict[str, Callable[[], Tensor]]:
    encode, tokenizer = model.module.encode_text, model.tokenizer

    def cut(tokens: Tensor) -> Tensor:
        return model.shorten(tokens)[0]

    return {
        "full context": lambda: unit([encode(part) for part in tokenizer(captions).split(batch)]),
        "cut": lambda: unit([encode(cut(part)) for part in tokenizer(captions).split(batch)]),
        # an encoder of its own each time: it keeps what it has encoded
        "cut and sorted": lambda: Encoder(model, batch_size=batch, device=torch.device("cpu")).texts(captions),
    }


def picture_ways(model: ClipModel, source: PairSource, count: int, batch: int) -> dict[str, Callable[[], Tensor]]:
    pixels = torch.stack(
        [torch.from_numpy(render_pixels(source.image(i), EVALUATION_VIEW, model.image).copy()) for i in range(count)]
    )
    prepared = normalise(pixels, model.image)
    encoder = Encoder(model, batch_size=batch, device=torch.device("cpu"))
    return {
        "eager tower": lambda: unit([model.module.encode_image(part) for part in prepared.split(batch)]),
        "encoder": lambda: torch.cat([encoder.encode_images(part) for part in pixels.split(batch)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="pairs in any form that `clipdistill train` reads")
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", type=Path, help="results; the same as Markdown goes beside it")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    torch.set_num_threads(arguments.threads)
    source = open_pairs(DataConfig(path=arguments.data), default_split="train")
    captions: list[str] = []
    for i in range(len(source)):
        captions += one_or_several(source.captions(i))
        if len(captions) >= arguments.captions:
            break
    captions = list(dict.fromkeys(captions))[: arguments.captions]
    model = build_student(arguments.model, seed=0)
    model.module.eval()
    pictures = min(arguments.pictures, len(source))
    one = captions[:1]
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {arguments.threads} threads, torch {torch.__version__}"
    results: dict[str, Any] = {
        "machine": machine,
        "settings": f"{arguments.model}, {len(captions)} captions, {pictures} pictures, batch {arguments.batch}, fp32",
        "captions": in_turn(text_ways(model, captions, arguments.batch), rounds),
        "one query": in_turn(text_ways(model, one, 1), max(10 * rounds, 10)),
        "pictures": in_turn(picture_ways(model, source, pictures, arguments.batch), rounds),
    }
    lines = ["# Encoding", "", f"{results['machine']}; {results['settings']}", ""]
    for what in ("captions", "one query", "pictures"):
        lines += [f"| {what} | s | times as fast (least to greatest) | largest difference |", "|---|---|---|---|"]
        for name, row in results[what].items():
            lines.append(
                f"| {name} | {row['seconds']:.3f} | {row['ratio']:.2f} ({row['least']:.2f} to {row['greatest']:.2f}) "
                f"| {row['difference']:.1e} |"
            )
        lines.append("")
    print("\n".join(lines))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        arguments.json.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
