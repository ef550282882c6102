"""The hard-concrete distribution (Louizos et al. 2018, arXiv 1712.01312) with the constants of CoFi and TinyCLIP.

A mask z in [0, 1] that is exactly 0 or 1 with positive probability and still has a gradient: a logistic variable is
squashed to (0, 1), stretched to (-0.1, 1.1) and cut off. Its one parameter, log alpha, is how firmly the part stays.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 2 / 3
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
EPSILON = 1e-6
LOWEST, HIGHEST = math.log(0.01), math.log(100)
"""Bounds of log alpha, kept after every step."""
_SOFTNESS = 0.8
_ZERO_LOGIT = math.log(-STRETCH_LOW / STRETCH_HIGH)  # ln(x / (1 - x)) at x = 0.1 / 1.2, where the stretched value is 0


def draw_noise(size: int, generator: torch.Generator) -> Tensor:
    """(size,) uniform numbers in [epsilon, 1 - epsilon) from a generator on the CPU."""
    return torch.rand(size, generator=generator) * (1 - 2 * EPSILON) + EPSILON


def sample(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Masks z for uniform `noise` of the same shape: clip(1.2 sigmoid((logit(u) + log alpha) / beta) - 0.1, 0, 1)."""
    logit = noise.log() - (-noise).log1p()
    squashed = torch.sigmoid((logit + log_alpha) / TEMPERATURE)
    return (squashed * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def probability_open(log_alpha: Tensor) -> Tensor:
    """P(z > 0), clamped to [epsilon, 1 - epsilon]."""
    return (1 - torch.sigmoid(TEMPERATURE * _ZERO_LOGIT - log_alpha)).clamp(EPSILON, 1 - EPSILON)


def inference_mask(log_alpha: Tensor, *, keep: int = 0) -> Tensor:
    """The mask without noise, (n,): sigmoid(0.8 log alpha / beta), with its smallest entries set to 0.

    As many are set to 0 as are expected to be, rounded, but at least `keep` stay. Of equal entries the later ones go.
    """
    mask = torch.sigmoid(_SOFTNESS * log_alpha / TEMPERATURE)
    expected_zeros = float((1 - probability_open(log_alpha).double()).sum())
    closed = min(math.floor(expected_zeros + 0.5), max(len(mask) - keep, 0))
    order = torch.argsort(log_alpha, descending=True, stable=True)
    mask = mask.clone()
    mask[order[len(mask) - closed :]] = 0
    return mask
