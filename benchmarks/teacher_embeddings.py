"""Embeddings of a teacher of locked towers for its own training pictures, cross-fitted if wished, as a teacher's file.

    python benchmarks/teacher_embeddings.py --student towers:image=...,text=... --data captions.json --folds 5 \\
        --features features --work runs/folds --out cross-fitted.npz [key=value ...]

A teacher is surer of the pairs it was trained on than of new ones, and distillation reads the embeddings of just these.
With --folds k, k more teachers are trained, each without one part of the pictures, and embed that part. Each lives in a
space of its own, so its embeddings are turned by the orthogonal matrix that brings those of its training pairs nearest
to the whole teacher's (Schoenemann 1966). The file serves as `--teacher cache:cross-fitted.npz`. Heads alone are
trained (recipe lit, size heads) on features that are computed once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import PairSource, Subset
from clipdistill.evaluate.retrieval import retrieval
from clipdistill.models import ClipModel, load_model
from clipdistill.train.config import RunConfig, resolve
from clipdistill.train.features import locked_features
from clipdistill.train.run import distill, with_precision

CPU = torch.device("cpu")


@torch.no_grad()
def embed(model: ClipModel, source: PairSource, config: RunConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(image (N, D), text (captions, D), which image each caption is of), from the features that are kept."""
    model.module.requires_grad_(False).eval()
    features = locked_features(model, source, config, CPU)
    assert features.text is not None
    counts = torch.tensor([len(source.captions(i)) for i in range(len(source))])
    image, text = model.module.encode_image(features.image[0]), model.module.encode_text(features.text)
    return normalize(image, dim=-1), normalize(text, dim=-1), torch.repeat_interleave(torch.arange(len(source)), counts)


def scores(name: str, image: Tensor, text: Tensor, owner: Tensor, count: int = 1000) -> None:
    """R@K among the first `count` pictures."""
    kept = owner < count
    found = retrieval(image[:count], text[kept], owner[kept], ks=(1, 10))
    print(name, *(f"{metric} {100 * value:.1f}" for metric, value in found.items() if "R@" in metric), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("student", "data", "features", "work", "out"):
        parser.add_argument(f"--{option}", required=True)
    parser.add_argument("--validation", help="split of the same data to measure the teachers on", default="val")
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()

    def train(name: str, source: PairSource) -> tuple[ClipModel, RunConfig]:
        fixed = [f"train.features_folder={given.features}", "train.views=fixed"]
        values = {"student": given.student, "data": source, "out": f"{given.work}/{name}"}
        config = with_precision(resolve("lit", values, size="heads", assignments=[*fixed, *given.settings]), CPU)
        return load_model(distill(config, quiet=True).student), config

    whole, validation = open_pairs(given.data, split="train"), open_pairs(given.data, split=given.validation)
    model, config = train("whole", whole)
    image, text, owner = embed(model, whole, config)
    scores("training pictures, whole teacher", image, text, owner)
    scores("validation, whole teacher", *embed(model, validation, config))
    part = torch.from_numpy(np.random.default_rng(0).permutation(len(whole)) % max(given.folds, 1))
    reference = (image, text) if not given.folds else (image.clone(), text.clone())
    for fold in range(given.folds):
        other, _ = train(f"fold-{fold}", Subset(whole, indices=torch.nonzero(part != fold)[:, 0].tolist()))
        own = embed(other, whole, config)
        scores(f"validation, fold {fold}", *embed(other, validation, config))
        seen = (part != fold, part[owner] != fold)
        product = sum(mine[rows].T @ target[rows] for mine, target, rows in zip(own[:2], reference, seen, strict=True))
        left, _, right = torch.linalg.svd(product)
        for rows, mine, target in ((part == fold, own[0], image), (part[owner] == fold, own[1], text)):
            target[rows] = mine[rows] @ left @ right
    if given.folds:
        scores("training pictures, cross-fitted", image, text, owner)
    Path(given.out).parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        given.out,
        keys=np.array([whole.key(i) for i in range(len(whole))]),
        image=image.numpy().astype(np.float16),
        text=text.numpy().astype(np.float16),
        captions=torch.bincount(owner).numpy(),
        logit_scale=np.asarray(float(model.module.logit_scale.exp())),
    )


if __name__ == "__main__":
    main()
