"""The model behind the service: pictures and texts to what its towers take, batches of that to unit rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from clipdistill.data.images import decode
from clipdistill.data.views import EVALUATION_VIEW, render_pixels
from clipdistill.embed.encode import Encoder
from clipdistill.models import load_model
from clipdistill.runtime.machine import pick_device

_CAPTIONS_KEPT = 4096


class ServedModel:
    """The model called `name` in evaluation mode on `device` (None: a GPU where there is one)."""

    def __init__(self, name: str, device: str | torch.device | None = None) -> None:
        where = pick_device(device)
        self.model = load_model(name, device=where, teacher=True)
        self._encoder = Encoder(self.model, device=where, progress=False)
        self.fingerprint = self.model.fingerprint()
        self.logit_scale = float(self.model.module.logit_scale.exp())  # type: ignore[operator, union-attr]

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return self.model.embed_dim

    def description(self) -> dict[str, object]:
        """What a client may know of the model; no name, which may be a path."""
        return {
            "fingerprint": self.fingerprint,
            "width": self.width,
            "image_size": self.model.image.size,
            "context_length": self.model.context_length,
            "logit_scale": round(self.logit_scale, 4),
            "runtime": self.model.architecture.get("exported", "torch"),
        }

    def pixels(self, data: bytes, most: int) -> np.ndarray:
        """The evaluation view, uint8 (size, size, 3), of an encoded picture of `most` pixels at most.

        Raises BadSample.
        """
        return render_pixels(decode(data, max_pixels=most), EVALUATION_VIEW, self.model.image)

    def tokens(self, texts: Sequence[str]) -> tuple[np.ndarray, list[int], list[int]]:
        """Tokens (n, L), which of the texts the context cuts, and of which the model knows no part."""
        tokenizer = self.model.tokenizer
        tokenizer.forget(_CAPTIONS_KEPT)
        tokens = tokenizer(texts).numpy()
        cut = [i for i, length in enumerate(tokenizer.lengths(texts)) if length > self.model.context_length]
        return tokens, cut, [i for i, text in enumerate(texts) if not tokenizer.knows(text)]

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """Unit rows (n, width) float32 of views uint8 (n, size, size, 3); not checked for NaN."""
        return self._encoder.encode_images(torch.from_numpy(pixels)).cpu().numpy()

    def texts(self, tokens: np.ndarray) -> np.ndarray:
        """Unit rows (n, width) float32 of tokens (n, L); not checked for NaN."""
        return self._encoder.encode_tokens(torch.from_numpy(tokens)).cpu().numpy()

    def warm_up(self, batch: int) -> None:
        """Run both towers at both ends of the batch sizes, so that no caller pays for what a first call sets up."""
        size = self.model.image.size
        for rows in (1, batch):
            self.images(np.zeros((rows, size, size, 3), dtype=np.uint8))
            self.texts(self.tokens(["a photograph"] * rows)[0])
