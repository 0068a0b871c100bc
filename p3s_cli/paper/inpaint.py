"""P3S eq. 3: the reference without its negative subject, I' = inpaint(I, negative \\ subject)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from p3s_cli.paper.points import Point, similarity_map

# (image (3, H, W) in [0, 1], region (H, W) bool, seed) -> image with the region filled
Filler = Callable[[Tensor, Tensor, int], Tensor]
# image (3, H, W) in [0, 1] -> patch features (H_p, W_p, D)
Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Inpainted:
    """The filled reference, and how it was judged.

    image (3, H, W) in [0, 1]; region (H, W) bool; similarity of the region to the positive point
    before and after; `filler` names what was used (`none` where there was nothing to remove).
    """

    image: Tensor
    region: Tensor
    before: float
    after: float
    filler: str


def fill_region(subject: Tensor, negative: Tensor, margin: float) -> Tensor:
    """The negative without the subject, grown by `margin` pixels, never into the subject. (H, W) bool."""
    if not negative.any():
        return torch.zeros_like(negative)
    distance = ndimage.distance_transform_edt(~(negative & ~subject).numpy())
    return torch.from_numpy(distance <= margin) & ~subject


def harmonic_fill(image: Tensor, region: Tensor, seed: int = 0) -> Tensor:
    """The classical filler: every pixel of the region takes the smooth (harmonic) blend of its border.

    Solved coarse to fine by repeated averaging, so that it also copes with regions of half a photo,
    where scikit-image's biharmonic filler runs out of memory. Deterministic; the seed is unused.
    """
    known = (~region).float()[None, None]
    levels = [(image[None] * known, known)]
    while min(levels[-1][1].shape[-2:]) > 2:
        value, weight = levels[-1]
        total = F.avg_pool2d(weight, 2, ceil_mode=True)
        mean = F.avg_pool2d(value * weight, 2, ceil_mode=True) / total.clamp(min=1e-6)
        levels.append((mean * (total > 0), (total > 0).float()))
    value, weight = levels.pop()
    guess = value + (1 - weight) * (value.sum((2, 3), keepdim=True) / weight.sum().clamp(min=1))
    for value, weight in reversed(levels):
        coarse = F.interpolate(guess, size=value.shape[-2:], mode="bilinear", align_corners=False)
        guess = value * weight + coarse * (1 - weight)
        for _ in range(20):
            blurred = F.avg_pool2d(F.pad(guess, (1, 1, 1, 1), mode="replicate"), 3, 1)
            guess = value * weight + blurred * (1 - weight)
    return guess[0]


def remove_negative(
    image: Tensor,
    region: Tensor,
    positive: list[Point],
    embed: Embed,
    filler: Filler | None,
    seed: int = 0,
    attempts: int = 3,
) -> Inpainted:
    """P3S eq. 3, with the paper's condition checked: what is filled in must not resemble the subject.

    After filling, the region's mean similarity to the positive patch must fall below what it was with
    the negative subject in it; otherwise the next seed, and last the classical filler. Pixels outside
    the region come back untouched.
    """
    if not region.any():
        return Inpainted(image, region, 0.0, 0.0, "none")
    before = region_similarity(embed(image), region, positive)
    candidates = [("model", seed + k) for k in range(attempts)] if filler else []
    for name, s in [*candidates, ("classical", seed)]:
        filled = (filler if name == "model" else harmonic_fill)(image, region, s)
        filled = torch.where(region, filled, image)
        after = region_similarity(embed(filled), region, positive)
        if after < before:
            break
    return Inpainted(filled, region, before, after, name if name == "classical" else f"model, seed {s}")


def region_similarity(features: Tensor, region: Tensor, positive: list[Point]) -> float:
    """Mean of eq. 1's positive map over the patches that lie (mostly) in the region."""
    similarity = similarity_map(features, positive)
    share = F.adaptive_avg_pool2d(region.float()[None, None], tuple(similarity.shape))[0, 0]
    inside = share >= min(0.5, float(share.max()))
    return float(np.mean(similarity[inside].numpy()))
