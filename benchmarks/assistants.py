"""Teacher to student directly, through one and through two assistants, at one total budget of steps (Mirzadeh et al.).

    python benchmarks/assistants.py --teacher cache:teachers/best.npz --data captions.json --features features \\
        --towers TOWERS --work runs/assistants --seeds 1

TOWERS is a folder with tf_efficientnet_lite0.safetensors and minilm_l6. Only heads on locked towers train, by CLIP-KD's
terms on Flickr8k, so a run is seconds of matrix products; an assistant's embeddings of the training pictures come from
the features that are kept, and are the next one's teacher. `--recipe assistant-stages` is the same chain with whole
models. The teacher of docs/pretrained.md: two image towers and MiniLM. Assistants: Lite0 at 224 pixels and MiniLM;
Lite0 at 128 and MiniLM. Student: Lite0 at 128 and MiniLM's first two layers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from clipdistill.data.open import open_pairs
from clipdistill.data.pairs import PairSource
from clipdistill.evaluate.retrieval import retrieval
from clipdistill.models import ClipModel, load_model
from clipdistill.runtime.files import write_json
from clipdistill.train.config import resolve
from clipdistill.train.run import distill
from teacher_embeddings import embed  # beside this file

HEADS = [
    "train.batch_size=512", "train.warmup_steps=20", "train.lock_image=all", "train.lock_text=all", "train.views=fixed",
    "train.feature_noise=0.3", "train.feature_dropout=0.2", "train.clip_grad_norm=1", "train.cache_samples=0",
    "train.attention=default", "train.compile=false", "preflight.enabled=false",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--teacher", "--data", "--features", "--towers", "--work"):
        parser.add_argument(option, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=18, help="of all runs of a chain together")
    parser.add_argument("--chains", default="direct,one,two", help="which, separated by commas")
    given = parser.parse_args()
    image = f"timm:tf_efficientnet_lite0@{given.towers}/tf_efficientnet_lite0.safetensors"
    both = f"towers:image={image},text=hf:{given.towers}/minilm_l6"
    models = {
        "assistant": (both, "bf16"),
        "smaller": (f"{both},size=128", "fp32"),
        "student": (f"{both},size=128,text_layers=2,hidden=512", "fp32"),
    }
    chains = {"direct": ["student"], "one": ["assistant", "student"], "two": ["assistant", "smaller", "student"]}
    chains = {name: chains[name] for name in given.chains.split(",")}
    train, validation = open_pairs(given.data, split="train"), open_pairs(given.data, split="val")
    work, found = Path(given.work), []
    for seed in range(given.seeds):
        for name, chain in chains.items():
            teacher, scores = given.teacher, {}
            for number, member in enumerate(chain):
                out = work / f"{name}-{seed}-{member}"
                student, precision = models[member]
                own = [f"train.epochs={given.epochs // len(chain)}", f"train.seed={seed + number}"]
                own += [f"train.features_folder={given.features}", f"train.precision={precision}"]
                values = {"teacher": teacher, "student": student, "data": train, "out": out}
                config = resolve("clip-kd", values, assignments=[*HEADS, *own])
                model = load_model(distill(config, quiet=True).student)
                scores = retrieval(*embed(model, validation, config), ks=(1, 10))
                print(name, seed, member, *(f"{k} {100 * v:.1f}" for k, v in scores.items() if "R@" in k), flush=True)
                if member != "student":
                    teacher = f"cache:{keep(out, *embed(model, train, config), model, train)}"
            found.append({"chain": name, "seed": seed, **{k: v for k, v in scores.items() if "R@" in k}})
            write_json(work / "assistants.json", found)
    for name in chains:
        rows = [row for row in found if row["chain"] == name]
        print(name, *(f"{k} {100 * np.mean([row[k] for row in rows]):.1f}" for k in rows[0] if "R@" in k))


def keep(
    out: Path, image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor, model: ClipModel, source: PairSource
) -> Path:
    """An assistant's embeddings of the training set, as a teacher's file."""
    path = out / "embeddings.npz"
    np.savez(
        path,
        keys=np.array([source.key(i) for i in range(len(source))]),
        image=image.numpy().astype(np.float16),
        text=text.numpy().astype(np.float16),
        captions=torch.bincount(owner).numpy(),
        logit_scale=np.asarray(float(model.module.logit_scale.exp())),
    )
    return path


if __name__ == "__main__":
    main()
