"""From a coarse mask to the image's own edges, with OpenCV's GrabCut in a band around the coarse outline."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from scipy import ndimage

from p3s_cli.segment.prototypes import holding

_ROUNDS = 3  # of GrabCut
_CONTEXT = 3  # patches of background around the band that its colour model learns from
_FLAT = 0.5
_PATCH = (16.0, 32.0)  # pixels a patch that GrabCut works at, at least and at most


def refine(
    image: np.ndarray,
    coarse: np.ndarray,
    other: np.ndarray,
    agreed: np.ndarray,
    seeds: Sequence[tuple[int, int]],
    patch: float,
    band: float,
) -> np.ndarray:
    """Move the outline of `coarse` to the image's edges.

    image (H, W, 3) uint8 RGB; coarse, other, agreed (H, W) bool: `other` surely does not belong to it, and
    of `coarse` only what is `agreed` (the walk leads there too) surely does; so do seeds, (row, column) of
    pixels. `patch` in pixels, `band` in patches: how far from the coarse outline the edge may lie. Returns
    (H, W) bool: components with a seed or a part surely inside, small holes closed.

    GrabCut weighs colours, which count by area, against edges, which count by length: on a small photo
    the same leg or handle is worth less of its outline, and is cut off. So small ones are enlarged first. Large
    ones are reduced: the time grows with the area, minutes for a phone's, and its outline is then within a pixel of these.
    """
    scale = min(max(patch, _PATCH[0]), _PATCH[1]) / patch
    if scale == 1:
        return _cut(image, coarse, other, agreed, seeds, patch, band)
    size = (round(coarse.shape[1] * scale), round(coarse.shape[0] * scale))  # columns first, as cv2 has it
    masks = (m.astype(np.float32) for m in (coarse, other, agreed))
    scaled = [cv2.resize(m, size, interpolation=cv2.INTER_LINEAR) > 0.5 for m in masks]
    spots = [(int((row + 0.5) * scale), int((column + 0.5) * scale)) for row, column in seeds]
    there, back = (cv2.INTER_LINEAR, cv2.INTER_AREA)[:: 1 if scale > 1 else -1]  # whichever enlarges is linear
    found = _cut(cv2.resize(image, size, interpolation=there), *scaled, spots, patch * scale, band).astype(np.float32)
    return cv2.resize(found, coarse.shape[::-1], interpolation=back) > 0.5


def _cut(image, coarse, other, agreed, seeds, patch: float, band: float) -> np.ndarray:
    """`refine` at the image's own size."""
    inside, outside = ndimage.distance_transform_edt(coarse), ndimage.distance_transform_edt(~coarse)
    reach = band * patch
    labels = np.full(coarse.shape, cv2.GC_BGD, dtype=np.uint8)
    labels[outside <= reach] = cv2.GC_PR_BGD
    labels[coarse] = cv2.GC_PR_FGD
    deep = inside > min(reach, 0.6 * inside.max())
    # ground that prototypes took along has its colour on both sides of the outline: left open, it goes
    labels[deep & agreed if (deep & agreed).any() else deep] = cv2.GC_FGD
    labels[other] = cv2.GC_BGD
    dot = max(1, round(patch / 5))
    for row, column in seeds:
        labels[max(0, row - dot) : row + dot + 1, max(0, column - dot) : column + dot + 1] = cv2.GC_FGD
    window = _window(labels != cv2.GC_BGD, round(_CONTEXT * patch))
    cut = labels[window].copy()
    if not ((cut == cv2.GC_BGD) | (cut == cv2.GC_PR_BGD)).any():
        return coarse  # nothing around it to tell it from
    if _flat(image[window], cut):
        return coarse
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(np.ascontiguousarray(image[window][..., ::-1]), cut, None, *models, _ROUNDS, cv2.GC_INIT_WITH_MASK)
    refined = np.zeros_like(coarse)
    refined[window] = (cut == cv2.GC_FGD) | (cut == cv2.GC_PR_FGD)
    sure = labels == cv2.GC_FGD  # not the click alone: on the outline it may be cut off from the rest
    return _without_pinholes(holding(refined, sure), (0.5 * patch) ** 2)


def _flat(image: np.ndarray, labels: np.ndarray) -> bool:
    """Whether one very colour fills most of what is open and most of either side: there is no edge, and GrabCut would look for
    it for minutes. image (H, W, 3) uint8, labels (H, W) GrabCut's."""
    codes = image.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    values, counts = np.unique(codes[(labels == cv2.GC_PR_BGD) | (labels == cv2.GC_PR_FGD)], return_counts=True)
    if not len(values):
        return False
    sides = [codes[labels == kind] for kind in (cv2.GC_PR_BGD, cv2.GC_PR_FGD, cv2.GC_BGD, cv2.GC_FGD)]
    return all((side == values[counts.argmax()]).mean() > _FLAT for side in sides if side.size)


def _window(mask: np.ndarray, margin: int) -> tuple[slice, slice]:
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    return (
        slice(max(0, rows[0] - margin), rows[-1] + margin + 1),
        slice(max(0, columns[0] - margin), columns[-1] + margin + 1),
    )


def _without_pinholes(mask: np.ndarray, area: float) -> np.ndarray:
    """Fill holes smaller than `area` pixels."""
    labels, count = ndimage.label(~mask)
    sizes = ndimage.sum_labels(~mask, labels, np.arange(count + 1))
    return mask | ((sizes < area)[labels] & ~mask)
