"""What the bank adds to a step: training steps of CLIP-RD and of the recipe `clipdistill`, in turns in one process.

    python benchmarks/bank.py                          # batches of 192, a bank of 1,000 pictures with five captions
    python benchmarks/bank.py --samples 0              # all pictures and captions at each step

Random pictures and teacher: only the time is looked at. Prints seconds of processor time a step and the median ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn.functional import normalize

from clipdistill.bank.divergence import Bank
from clipdistill.models import build_student
from clipdistill.objective import Embeddings, Objective
from clipdistill.train.step import Towers, forward_backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="flickr-student")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--width", type=int, default=256, help="of the teacher's embeddings")
    parser.add_argument("--pictures", type=int, default=6000)
    parser.add_argument("--captions", type=int, default=5, help="of each picture")
    parser.add_argument("--samples", type=int, default=1000, help="pictures in a step's bank (0: all)")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.manual_seed(0)
    student = build_student(given.student, seed=0, captions=["a dog runs over the grass", "two children on a swing"])
    towers = Towers(student.module.train())
    count = given.samples or given.pictures
    image, text = (normalize(torch.randn(rows, given.width), dim=-1) for rows in (count, count * given.captions))
    place = torch.randint(count, (given.batch,))
    bank = Bank(image, text, torch.full((count,), given.captions), place)
    teacher = Embeddings(image[place], text[place * given.captions], 30.0, bank=bank)
    pictures = torch.randn(given.batch, 3, student.image.size, student.image.size)
    tokens = student.tokenizer(["a dog runs over the grass"] * given.batch)
    (tokens,) = student.shorten(tokens)
    objectives = {
        name: Objective.from_recipe(name, student_dim=student.embed_dim, teacher_dim=given.width)
        for name in ("clip-rd", "clipdistill")
    }
    times: dict[str, list[float]] = {name: [] for name in objectives}
    for step in range(given.rounds + 1):
        for name, objective in objectives.items():
            towers.zero_grad(set_to_none=True)
            began = time.process_time()
            forward_backward(
                towers, objective, pictures, tokens, teacher, micro_batch=None, precision="fp32", seed=(0, step, 0)
            )
            times[name].append(time.process_time() - began)
    for name, seconds in times.items():
        print(f"{name:<12} {statistics.median(seconds[1:]):.3f} s a step")
    pairs = zip(times["clipdistill"][1:], times["clip-rd"][1:])
    print(f"clipdistill / clip-rd, median of {given.rounds} turns: {statistics.median(a / b for a, b in pairs):.3f}")


if __name__ == "__main__":
    main()
