"""Points on a photo -> both masks: prototypes compete for the patches, then the image's own edges decide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from p3s_cli.config import MaskConfig
from p3s_cli.paper.points import Point, Selection, patch_of, separability, similarity_map
from p3s_cli.segment.agreement import agree
from p3s_cli.segment.boundary import refine

_LOW_CONFIDENCE = 0.4  # of Otsu's separability


def select(
    image: Tensor, features: Tensor, positive: Sequence[Point], negative: Sequence[Point], config: MaskConfig
) -> Selection:
    """Masks of the subject and of the negative, the same way for both; neither ever holds the other's pixels.

    image (3, H, W) in [0, 1]; features (H_p, W_p, D); points as fractions (x, y). The maps returned are
    those of P3S eq. 1, for the eye.
    """
    size = (image.shape[1], image.shape[2])
    won = agree(features.numpy(), positive, negative, config)
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    coarse = [_enlarged(m.astype(np.float32), size) > 0.5 for m in (won.subject, won.negative)]
    walked = [_enlarged(m.astype(np.float32), size) > 0.5 for m in won.regions]
    sides = [[patch_of(p, size) for p in points] for points in (positive, negative)]
    patch = max(size[0] / features.shape[0], size[1] / features.shape[1])
    masks = []
    for own, other, seeds in ((0, 1, sides[0]), (1, 0, sides[1])):
        for row, column in seeds:
            coarse[own][row, column], coarse[other][row, column] = True, False
        sure = coarse[other], walked[own]
        masks.append(refine(pixels, coarse[own], *sure, seeds, patch, config.band) if seeds else coarse[own])
    subject, other = _without_overlap(*masks, _enlarged(won.ownership, size))
    return Selection(
        positive_map=similarity_map(features, positive),
        negative_map=similarity_map(features, negative),
        subject=torch.from_numpy(subject),
        negative=torch.from_numpy(other),
        warnings=tuple(_warnings(subject, bool(negative), patch, separability(won.objectness))),
        confidence=separability(won.objectness),
    )


def _enlarged(score: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(score, dtype=np.float32))[None, None]
    return F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()


def _without_overlap(subject: np.ndarray, negative: np.ndarray, ownership: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that both masks claim go to the side that owns them."""
    both = subject & negative
    return subject & ~(both & (ownership < 0)), negative & ~(both & (ownership >= 0))


def _warnings(subject: np.ndarray, has_negative: bool, patch: float, confidence: float) -> list[str]:
    """What probably went wrong, each with its remedy."""
    warnings = []
    if confidence < _LOW_CONFIDENCE:
        warnings.append(
            "little stands out from the background here; look at the overlay and add points where it is wrong"
        )
    if subject.mean() > 0.9:
        warnings.append(
            "the subject's mask covers nearly the whole photo; add a negative point on what it should not cover"
        )
    elif not has_negative and len(_lobes(subject, patch)) > 1:
        warnings.append("the subject's mask may cover two things that touch; add a negative point on the other one")
    return warnings


def _lobes(mask: np.ndarray, patch: float) -> list[float]:
    """Parts that the mask falls into when a neck thinner than a few patches is cut, each at least a quarter of it."""
    depth = ndimage.distance_transform_edt(mask)
    labels, count = ndimage.label(depth > min(1.5 * patch, 0.5 * depth.max()))
    shares = ndimage.sum_labels(np.ones_like(depth), labels, np.arange(1, count + 1)) / max(1, (labels > 0).sum())
    return [s for s in shares if s >= 0.25]
