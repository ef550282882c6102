"""Data of your own: an object of your program, or a format that is opened by its name.

From the shell:   clipdistill train --plugin own_data.py --data flags:train --recipe clip-rd --size debug --out mine
From Python:      python own_data.py
"""

import numpy as np

import clipdistill as cd

COLOURS = {"red": (212, 38, 38), "green": (42, 156, 58), "blue": (40, 82, 214), "yellow": (250, 216, 36)}


class Flags:
    """Flags of two stripes. Any object with a length whose items are (image, caption or captions) will do, such as a
    torch Dataset; an item may also be a mapping with 'image', 'captions' and 'key'."""

    def __init__(self, first: int, count: int):
        self.numbers = range(first, first + count)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        dice = np.random.default_rng(self.numbers[i])  # the same flag whenever it is asked for
        left, right = dice.choice(list(COLOURS), 2, replace=False)
        pixels = np.empty((64, 64, 3), np.uint8)  # or a picture of PIL, the bytes of a JPEG, a path
        pixels[:, :32], pixels[:, 32:] = COLOURS[left], COLOURS[right]
        pixels = np.clip(pixels + dice.integers(-20, 20, pixels.shape), 0, 255).astype(np.uint8)
        captions = [f"a {left} and {right} flag", f"{left} on the left, {right} on the right"]
        return {"image": pixels, "captions": captions, "key": f"flag-{self.numbers[i]}"}


def open_flags(config):
    """From the settings (config.path, config.split, ...) to the data: an object as above, or a PairSource."""
    return Flags(0, 64) if config.path.endswith("train") else Flags(1000, 32)


cd.register_format("flags", matches=lambda name: name.startswith("flags:"), open=open_flags)

if __name__ == "__main__":
    settings = {"recipe": "clip-rd", "size": "debug", "out": "runs/flags"}
    run = cd.distill({**settings, "data": Flags(0, 64), "validation": Flags(1000, 32)})
    for score in cd.evaluate(run.folder, Flags(1000, 32), progress=False):
        print(score)
