"""P3S eq. 1-2: from points to a subject mask and a negative mask.

Maps live on the patch grid (H_p, W_p); masks are at pixel resolution. Points are (x, y) fractions of
the image in [0, 1], so nothing in here knows about resizing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor
from torch.nn import functional as F

from p3s_cli.config import MaskConfig

Point = tuple[float, float]


@dataclass(frozen=True)
class Selection:
    """What eq. 1-2 make of the points.

    Maps (H_p, W_p) float32; masks (H, W) bool. `warnings` are sentences: a lowered threshold, a full
    mask, two masks that overlap. `confidence` in [0, 1]: `separability`.
    """

    positive_map: Tensor
    negative_map: Tensor
    subject: Tensor
    negative: Tensor
    warnings: tuple[str, ...]
    confidence: float


def patch_of(point: Point, grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the patch that covers the point."""
    rows, columns = grid
    return min(int(point[1] * rows), rows - 1), min(int(point[0] * columns), columns - 1)


def similarity_map(features: Tensor, points: Sequence[Point]) -> Tensor:
    """P3S eq. 1: M[i, j] = cos(F[p], F[i, j]), the maximum over several points; zeros without points.

    features (H_p, W_p, D) -> (H_p, W_p).
    """
    unit = F.normalize(features.float(), dim=-1)
    if not points:
        return torch.zeros(unit.shape[:2])
    anchors = torch.stack([unit[patch_of(p, unit.shape[:2])] for p in points])
    return torch.einsum("hwd,kd->khw", unit, anchors).amax(0).cpu()


def rescaled(similarity: Tensor) -> Tensor:
    """Stretch a map to [0, 1]; a constant map becomes zeros."""
    low, high = similarity.min(), similarity.max()
    return (similarity - low) / (high - low) if high > low else torch.zeros_like(similarity)


def contrast_map(wanted: Tensor, unwanted: Tensor, sigma: float) -> Tensor:
    """Inside eq. 2: Psi(M_P (1 - M_N)), Psi a Gaussian of `sigma` patches."""
    return torch.from_numpy(ndimage.gaussian_filter((wanted * (1 - unwanted)).numpy(), sigma)).float()


def connected_mask(score: np.ndarray, seeds: Sequence[tuple[int, int]]) -> tuple[np.ndarray, bool]:
    """Eq. 2's Otsu threshold, then only the components that hold a seed (row, column).

    A seed always ends inside: where the threshold excludes one, it falls to the largest value that
    includes them all; of a constant score that is everything. Returns the mask and whether that happened.
    """
    threshold = threshold_otsu(score) if score.min() < score.max() else score.min()
    lowest = min(score[s] for s in seeds)
    lowered = lowest <= threshold
    above = score >= lowest if lowered else score > threshold
    labels, _ = ndimage.label(above)
    return np.isin(labels, [labels[s] for s in seeds]), lowered


def separability(score: np.ndarray) -> float:
    """How far Otsu's threshold is from both sides: between-class over total variance, 1 for two flat levels."""
    if score.min() == score.max():
        return 0.0
    above = score > threshold_otsu(score)
    share = above.mean()
    if not 0 < share < 1:
        return 0.0
    between = share * (1 - share) * (score[above].mean() - score[~above].mean()) ** 2
    return float(between / score.var())


def select(
    features: Tensor, positive: Sequence[Point], negative: Sequence[Point], size: tuple[int, int], config: MaskConfig
) -> Selection:
    """P3S eq. 1-2, for the subject and, with the roles swapped, for the negative.

    features (H_p, W_p, D); points as fractions (x, y); size (H, W) of the masks in pixels.
    """
    maps = [similarity_map(features, points) for points in (positive, negative)]
    if config.similarity == "rescaled":
        maps = [rescaled(m) for m in maps]
    warnings, masks, confidence = [], [], 1.0
    for name, points, wanted, unwanted in (("positive", positive, *maps), ("negative", negative, *maps[::-1])):
        if not points:
            masks.append(torch.zeros(size, dtype=torch.bool))
            continue
        score = contrast_map(wanted, unwanted, config.sigma)
        confidence = min(confidence, separability(score.numpy()))
        score = F.interpolate(score[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
        mask, lowered = connected_mask(score, [patch_of(p, size) for p in points])
        if lowered:
            warnings.append(f"Otsu's threshold left a {name} point outside its mask, so it was lowered to include it")
        if mask.mean() > 0.9:
            warnings.append(
                f"the mask of the {name} point covers nearly the whole image; add a point on what it should not cover"
            )
        masks.append(torch.from_numpy(mask))
    subject, other = masks
    if (subject & other).any():
        warnings.append("the two masks overlap; the shared pixels are kept as the subject's")
    return Selection(maps[0], maps[1], subject, other & ~subject, tuple(warnings), confidence)
