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


def worths(logits: Tensor, chosen: Tensor) -> Tensor:
    """(N,) losses l_i of the pairs of (N, N) logits, each among the pairs `chosen` (n,) and itself."""
    own = logits.diagonal()
    rows = torch.cat([logits[:, chosen], own[:, None]], dim=1).logsumexp(1)
    columns = torch.cat([logits[chosen], own[None]], dim=0).logsumexp(0)
    return (rows + columns) / 2 - own


def select(student: Tensor, teacher: Tensor, count: int, rng: np.random.Generator, chunks: int = CHUNKS) -> Tensor:
    """Sorted numbers (count,) of the pairs drawn, by the logits (N, N) of student and teacher; rng: of the noise."""
    left = torch.ones(len(student), dtype=torch.bool)
    chosen = torch.zeros(0, dtype=torch.int64)
    student, teacher = student.float().cpu(), teacher.float().cpu()
    for part in np.array_split(np.arange(count), min(chunks, count)):
        worth = worths(student, chosen) - worths(teacher, chosen) if len(chosen) else torch.zeros(len(student))
        noise = torch.from_numpy(rng.gumbel(size=len(student))).float()
        drawn = (worth + noise).masked_fill(~left, -torch.inf).topk(len(part)).indices
        left[drawn] = False
        chosen = torch.cat([chosen, drawn])
    return chosen.sort().values
