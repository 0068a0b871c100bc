"""A first region for each side: the random walker of Grady (2006) on the grid of patches.

Neighbouring patches are joined by edges as strong as they are alike. Clicks are sources; the frame, and
weakly every patch that looks like much of the frame, drains into the background. The potential of a patch
is the chance that a walker from there ends at a click. It hardly falls inside an object, wherever in it
the click is, and falls steeply at its outline: so the region does not depend on the clicked patch being
typical of the object.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve
from skimage.filters import threshold_otsu

from p3s_cli.paper.points import Point, patch_of

_REACH = 2  # patches, the longest edge
_SHARPNESS = 4.0  # distances are measured in the mean neighbour's, divided by this
_WIDTH = 0.75  # of a click, in patches: its own patch may be mostly background
_SOURCE, _FRAME, _INSIDE = 10.0, 1.0, 0.05  # conductances at clicks, the frame and elsewhere, in median degrees
_LEAST = 1e-6  # drain of every patch, so that an island of the graph has a solution
_SHARE = 0.3  # of the frame that must look like a patch before that patch is like the frame
_SMOOTH = 0.5  # of the potential, in patches


def frame_of(grid: tuple[int, int]) -> np.ndarray:
    """(H_p, W_p) bool, True on the outermost patches."""
    frame = np.ones(grid, dtype=bool)
    frame[1:-1, 1:-1] = False
    return frame


def frame_likeness(features: np.ndarray) -> np.ndarray:
    """How much like the frame each patch is: its mean cosine with the 30 % of the frame most like it, (H_p, W_p).

    A subject cut by the frame takes less of it than that, and so does not count as what the frame is like.
    """
    frame = features[frame_of(features.shape[:2])]
    count = max(1, int(_SHARE * len(frame)))
    return np.partition(features @ frame.T, -count, axis=-1)[..., -count:].mean(-1)


def nearer(potentials: np.ndarray) -> np.ndarray:
    """Which side's clicks a walker meets rather, in [-1, 1]: 1 only the first's, -1 only the second's, (H_p, W_p).

    The nearness that counts between look-alikes: not the straight line to a click, on which the twin may be
    the closer one, but whether one gets there without crossing an outline.
    """
    first, second = potentials
    return (first - second) / (np.abs(first) + np.abs(second) + 1e-12)


def within(potentials: np.ndarray) -> np.ndarray:
    """How far inside what the clicks reach a patch lies, in [0, 1): 0 outside, (H_p, W_p).

    (u - t) / (u + t), u the summed potential and t Otsu's threshold of it. Below t it says nothing: another
    part of the object may be as far along the walk as the ground is.
    """
    total = ndimage.gaussian_filter(potentials.sum(0), _SMOOTH)
    if not np.ptp(total) > 0:
        return np.zeros_like(total)
    threshold = threshold_otsu(total)
    return np.maximum(0, (total - threshold) / (total + threshold + 1e-12))


def regions(potentials: np.ndarray, sides: Sequence[Sequence[Point]]) -> list[np.ndarray]:
    """`potentials` (2, H_p, W_p) and each side's points -> a mask (H_p, W_p) for each.

    What lies `within` is the side's with the highest potential; components without a click in or next to
    them are dropped.
    """
    grid = potentials.shape[1:]
    above = within(potentials) > 0
    first, second = potentials
    owned = (first > second, second > first)
    return [
        near_seeds(above & own, [patch_of(p, grid) for p in points]) for own, points in zip(owned, sides, strict=True)
    ]


def near_seeds(mask: np.ndarray, seeds: Sequence[tuple[int, int]]) -> np.ndarray:
    """Only the connected components with a seed (row, column) in them or next to them."""
    labels, _ = ndimage.label(mask)
    around = [labels[max(0, r - 1) : r + 2, max(0, c - 1) : c + 2].ravel() for r, c in seeds]
    kept = np.unique(np.concatenate(around)) if around else np.zeros(0, dtype=int)
    return np.isin(labels, kept[kept > 0])


def potentials(features: np.ndarray, sides: Sequence[Sequence[Point]]) -> np.ndarray:
    """Unit patch features (H_p, W_p, D) and each side's points -> (2, H_p, W_p).

    Solves (L + T) u = T_side for each side, L the graph's Laplacian and T the conductances to the ends.
    """
    grid = features.shape[:2]
    centred = features - features.mean((0, 1))
    centred /= np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-8)
    weights, scale = _edges(centred)
    degree = np.asarray(weights.sum(1)).ravel()
    unit = max(float(np.median(degree)), 1e-12)
    like = np.exp((frame_likeness(centred) - 1) / scale)
    frame = frame_of(grid)
    like = np.minimum(like / max(np.median(like[frame]), 1e-12), 1)
    sources = [_source(points, like) for points in sides]
    free = 1 - np.maximum(*sources)
    ends = [_SOURCE * unit * s.ravel() for s in sources]
    drain = unit * ((_FRAME * frame + _INSIDE) * like * free + _LEAST).ravel()
    system = sparse.diags(degree + sum(ends) + drain) - weights
    return spsolve(system.tocsc(), np.stack(ends, 1)).T.reshape(2, *grid)


def _source(points: Sequence[Point], like: np.ndarray) -> np.ndarray:
    """A Gaussian about each click, moved off what looks like the frame: (H_p, W_p) in [0, 1]."""
    rows, columns = np.mgrid[: like.shape[0], : like.shape[1]] + 0.5
    source = np.zeros(like.shape)
    for x, y in points:
        squared = (columns - x * like.shape[1]) ** 2 + (rows - y * like.shape[0]) ** 2
        spot = np.exp(-squared / (2 * _WIDTH**2)) * (1.05 - like)
        source = np.maximum(source, spot / spot.max())
    return source


def _edges(features: np.ndarray) -> tuple[sparse.csr_array, float]:
    """Symmetric weights exp(-distance / scale) / length^2 (N, N), and the scale: of this photo and tower."""
    numbers = np.arange(features[..., 0].size).reshape(features.shape[:2])
    pairs = [(features[a], features[b], numbers[a], numbers[b], length) for a, b, length in _shifts(numbers.shape)]
    distances = [1 - (u * v).sum(-1).ravel() for u, v, *_ in pairs]
    adjacent = np.concatenate([d for d, (*_, length) in zip(distances, pairs, strict=True) if length == 1])
    scale = max(float(np.mean(adjacent)) / _SHARPNESS, 1e-6)  # the median is 0 on flat drawings
    values = np.concatenate([np.exp(-d / scale) / p[4] for d, p in zip(distances, pairs, strict=True)])
    starts, ends = (np.concatenate([p[i].ravel() for p in pairs]) for i in (2, 3))
    half = sparse.coo_array((values, (starts, ends)), shape=(numbers.size, numbers.size)).tocsr()
    return half + half.T, scale


def _shifts(grid: tuple[int, int]) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice], int]]:
    """Both ends of all edges in one direction, and their squared length; each direction once."""
    rows, columns = grid
    for dy in range(_REACH + 1):
        for dx in range(-_REACH, _REACH + 1):
            if (dy, dx) <= (0, 0) or dy * dy + dx * dx > _REACH**2:
                continue
            start = slice(0, rows - dy), slice(max(0, -dx), columns - max(0, dx))
            end = slice(dy, rows), slice(max(0, dx), columns + min(0, dx))
            yield start, end, dy * dy + dx * dx
