"""A student of your own: any torch.nn.Module with encode_image and encode_text.

From the shell:   clipdistill train --plugin own_student.py --student patches --recipe clip-rd --size debug --out mine
From Python:      python own_student.py
"""

import torch
from torch import nn

import clipdistill as cd


class Patches(nn.Module):
    """Averaged patches and averaged words: no attention, no convolution, 200 000 parameters."""

    image_size = 64  # what the package need not find by trying; image_mean, image_std, embed_dim and so on work alike

    def __init__(self, tokenizer, width: int = 128):
        super().__init__()
        self.tokenizer = tokenizer  # given by the run: the teacher's, so that both read the same words
        self.patches = nn.Conv2d(3, width, kernel_size=8, stride=8)
        self.words = nn.Embedding(tokenizer.vocab_size, width)
        self.image_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.text_head = nn.Linear(width, width)
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())

    def encode_image(self, images):
        """(B, 3, 64, 64) -> (B, width)."""
        return self.image_head(nn.functional.gelu(self.patches(images)).mean(dim=(2, 3)))

    def encode_text(self, tokens):
        """(B, L) -> (B, width)."""
        real = (tokens != 0).unsqueeze(-1)
        return self.text_head((self.words(tokens) * real).sum(1) / real.sum(1))


# a name makes it usable everywhere, and lets a saved run be loaded again; an instance can be given instead of a name
cd.register_student("patches", Patches)

if __name__ == "__main__":
    run = cd.distill({"recipe": "clip-rd", "size": "debug", "student": "patches", "out": "runs/patches"})
    module, preprocess, tokenizer = cd.load_student(run.student)
    print(type(module).__name__, module.encode_text(tokenizer("a red square")).shape)
    for score in cd.evaluate(run.folder, "scenes:val?size=64"):
        print(score)
