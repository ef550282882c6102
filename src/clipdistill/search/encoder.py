"""One model as search uses it: pictures and queries in, vectors of length 1 out."""

from __future__ import annotations

from threading import Lock

import numpy as np
import torch
from PIL import Image

from clipdistill.data.views import EVALUATION_VIEW, render_pixels
from clipdistill.embed.encode import Encoder
from clipdistill.models import load_model
from clipdistill.runtime.machine import pick_device


class SearchModel:
    """The model called `name` (any model name), in evaluation mode on `device` (None: a GPU when there is one).

    role: "student" or "teacher"; engine: what runs the towers; a lock lets several threads ask.
    """

    def __init__(
        self, name: str, role: str = "student", device: str | torch.device | None = None, engine: str = "torch"
    ) -> None:
        self.name = name
        self.role = role
        self.device = pick_device(device)
        self.model = load_model(name, device=self.device, teacher=True)
        self.fingerprint = self.model.fingerprint()
        self._lock = Lock()
        self._encoder = Encoder(self.model, device=self.device, engine=engine)
        self._what = f"this input with {name}"

    @property
    def description(self) -> dict[str, object]:
        """What the index remembers of the model."""
        return {"name": self.name, "fingerprint": self.fingerprint, "embed_dim": self.model.embed_dim}

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """The evaluation view of a picture before normalisation, uint8 (size, size, 3)."""
        return render_pixels(picture, EVALUATION_VIEW, self.model.image)

    def at_least(self) -> int:
        """Pixels of the shorter side that a photograph is decoded to at least: twice what the model looks at."""
        return 2 * self.model.image.size

    def expect(self, pictures: int) -> None:
        """How many pictures are about to come: the engine `auto` looks at that."""
        self._encoder.expected["image"] = pictures

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """Vectors (n, D) float32 of the views (n, size, size, 3)."""
        with self._lock:
            return self._encoder.encode_images(torch.from_numpy(pixels), self._what).cpu().numpy()

    def text(self, text: str) -> np.ndarray:
        """The vector (D,) of a text."""
        with self._lock:
            return self._encoder.encode_tokens(self.model.tokenizer([text]), self._what).cpu().numpy()[0]

    def image(self, picture: Image.Image) -> np.ndarray:
        """The vector (D,) of a picture."""
        return self.images(self.pixels(picture)[None])[0]

    def cut(self, text: str) -> bool:
        """Whether the model reads only the beginning of this text."""
        return self.model.tokenizer.lengths([text])[0] > self.model.context_length

    def knows(self, text: str) -> bool:
        """Whether anything of this text is more to the model than an unknown word."""
        return self.model.tokenizer.knows(text)

    def warm_up(self) -> None:
        """Run both towers, so that the first query is not charged for what the first call sets up."""
        size = self.model.image.size
        for _ in range(2):
            self.text("a photograph")
            self.images(np.zeros((1, size, size, 3), dtype=np.uint8))
