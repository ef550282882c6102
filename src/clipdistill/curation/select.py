"""Active curation: of a super-batch the pairs that the student has still to learn and its teacher already knows.

ACID (arXiv 2411.18674) with JEST's way of drawing jointly (arXiv 2406.17711), for the softmax loss. A pair's worth is
its loss by the student minus its loss by the teacher, among the pairs drawn so far, M:

    worth_i(M) = l_i(S) - l_i(T),   l_i(Z) = 1/2 [lse_{j in M + i} Z_ij + lse_{j in M + i} Z_ji] - Z_ii

S, T the student's and the teacher's logits over the super-batch. M grows by chunks: each is drawn from what is left
without putting back, with probabilities that go as exp(worth) (the largest of worth + Gumbel noise). The first chunk
meets no other pair, so its worths are 0 and it is drawn evenly. JEST's losses are sigmoids and its first chunk goes by
the pairs alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CHUNKS = 16
"""As in both papers."""


class Worths:
    """Losses l_i of all pairs of (N, N) logits, each among the pairs drawn so far and itself."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.own = logits, logits.diagonal()
        self.rows = self.columns = torch.full_like(self.own, -torch.inf)  # logsumexp over what is drawn

    def add(self, drawn: Tensor) -> None:
        """Take note of pairs that were drawn now."""
        self.rows = torch.logaddexp(self.rows, self.logits[:, drawn].logsumexp(1))
        self.columns = torch.logaddexp(self.columns, self.logits[drawn].logsumexp(0))

    def __call__(self) -> Tensor:
        """(N,); what it says of a pair that is drawn already means nothing."""
        return (torch.logaddexp(self.rows, self.own) + torch.logaddexp(self.columns, self.own)) / 2 - self.own


def select(student: Tensor, teacher: Tensor, count: int, rng: np.random.Generator, chunks: int = CHUNKS) -> Tensor:
    """Sorted numbers (count,) of the pairs drawn, by the logits (N, N) of student and teacher; rng: of the noise."""
    left = torch.ones(len(student), dtype=torch.bool)
    ours, theirs = (Worths(logits.float().cpu()) for logits in (student, teacher))
    chosen: list[Tensor] = []
    for part in np.array_split(np.arange(count), min(chunks, count)):
        noise = torch.from_numpy(rng.gumbel(size=len(student))).float()
        drawn = (ours() - theirs() + noise).masked_fill(~left, -torch.inf).topk(len(part)).indices
        left[drawn] = False
        for worths in (ours, theirs):
            worths.add(drawn)
        chosen.append(drawn)
    return torch.cat(chosen).sort().values
