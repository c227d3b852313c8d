"""Means that a few members cannot pull where they like. Each works on one chunk, as its owner holds it from everyone.

To clip chunk by chunk, each at its owner's, is ButterflyClip (Gorbunov et al., "Secure distributed training at
scale", 2022); within a chunk it is centred clipping (Karimireddy et al., "Learning from history for Byzantine robust
optimization", 2021). The trimmed mean is that of Yin et al. 2018. All members weigh the same, whatever their samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

TRIMMED = 0.2  # of the members, at either end; at least one
ITERATIONS = 3


def trimmed(values: torch.Tensor) -> torch.Tensor:
    """The mean of each coordinate without its extremes. [M, N] to [N]; fewer than three members are just averaged."""
    members = len(values)
    if members < 3:
        return values.mean(dim=0)
    cut = min(max(1, int(TRIMMED * members)), (members - 1) // 2)
    return values.sort(dim=0).values[cut : members - cut].mean(dim=0)


def clipped(values: torch.Tensor) -> torch.Tensor:
    """Centred clipping around the coordinates' medians, with their median distance as the radius. [M, N] to [N]."""
    if len(values) < 3:
        return values.mean(dim=0)
    centre = values.median(dim=0).values
    radius = (values - centre).norm(dim=1).median()
    for _ in range(ITERATIONS):
        offsets = values - centre
        shrunk = (radius / offsets.norm(dim=1).clamp(min=1e-30)).clamp(max=1.0)
        centre = centre + (offsets * shrunk[:, None]).mean(dim=0)
    return centre


ROBUST: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"clip": clipped, "trimmed": trimmed}
