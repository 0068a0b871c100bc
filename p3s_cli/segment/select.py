"""Points on a photo -> both masks: prototypes compete for the patches, then the image's own edges decide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from p3s_cli.config import MaskConfig
from p3s_cli.paper.points import Point, Selection, patch_of, similarity_map
from p3s_cli.segment.boundary import refine
from p3s_cli.segment.prototypes import Competition, compete


def select(
    image: Tensor, features: Tensor, positive: Sequence[Point], negative: Sequence[Point], config: MaskConfig
) -> Selection:
    """Masks of the subject and of the negative, the same way for both; neither ever holds the other's pixels.

    image (3, H, W) in [0, 1]; features (H_p, W_p, D); points as fractions (x, y). The maps returned are
    those of P3S eq. 1, for the eye.
    """
    size = (image.shape[1], image.shape[2])
    won = compete(features.numpy(), positive, negative, config)
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    coarse = [_enlarged(m.astype(np.float32), size) > 0.5 for m in (won.subject, won.negative)]
    sides = [[patch_of(p, size) for p in points] for points in (positive, negative)]
    patch = max(size[0] / features.shape[0], size[1] / features.shape[1])
    masks = []
    for own, other, seeds in ((0, 1, sides[0]), (1, 0, sides[1])):
        for row, column in seeds:
            coarse[own][row, column], coarse[other][row, column] = True, False
        masks.append(refine(pixels, coarse[own], coarse[other], seeds, patch, config.band) if seeds else coarse[own])
    subject, other = _without_overlap(*masks, _enlarged(won.ownership, size))
    maps = similarity_map(features, positive), similarity_map(features, negative)
    return Selection(
        *maps, torch.from_numpy(subject), torch.from_numpy(other), tuple(_warnings(won, subject, negative))
    )


def _enlarged(score: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(score, dtype=np.float32))[None, None]
    return F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()


def _without_overlap(subject: np.ndarray, negative: np.ndarray, ownership: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that both masks claim go to the side that owns them."""
    both = subject & negative
    return subject & ~(both & (ownership < 0)), negative & ~(both & (ownership >= 0))


def _warnings(won: Competition, subject: np.ndarray, negative: Sequence[Point]) -> list[str]:
    warnings = []
    if float(np.ptp(won.objectness)) < 0.02:
        warnings.append("nothing in the photo stands out from its background; the masks mean little")
    if subject.mean() > 0.9:
        warnings.append(
            "the subject's mask covers nearly the whole photo; add a negative point on what it should not cover"
        )
    return warnings
