"""Which patches are the subject, which the negative, which neither: three sets of prototypes compete.

The clicks' regions (`walk.py`) start the subject's and the negative's prototypes, patches on the frame
the background's. A patch is an object where an object's prototype is nearer than any of the background's,
and belongs to the nearer of the two objects; for both, it also counts where the walk leads. Components
apart from the clicks and their regions are dropped, the prototypes taken anew from what of the masks just
found is surest, and all of it repeated.

The two objects are treated alike: swapping the points swaps the masks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from scipy.cluster.vq import kmeans2
from skimage.filters import threshold_otsu

from p3s_cli.config import MaskConfig
from p3s_cli.paper.points import Point, patch_of
from p3s_cli.segment import walk

_LEAST_BACKGROUND = 20  # patches; from fewer no background is learnt
_FRAME_SHARE = 0.4  # of the frame: objects that take more of it are suspected to be the ground


@dataclass(frozen=True)
class Competition:
    """Who won each patch. Masks (H_p, W_p) bool; `objectness` above 0 is an object, `ownership` above 0 the
    subject's side; `regions` is where the walk alone leads from each side's clicks."""

    subject: np.ndarray
    negative: np.ndarray
    objectness: np.ndarray
    ownership: np.ndarray
    regions: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class _Given:
    """What the clicks and the walk say before anything is learnt; of pairs, the subject's and the negative's."""

    features: np.ndarray  # (H_p, W_p, D), unit vectors
    sides: Sequence[Sequence[Point]]
    regions: Sequence[np.ndarray]  # where the walk leads, (H_p, W_p) bool
    cores: Sequence[np.ndarray]  # what of them is least like the frame
    within: np.ndarray  # (H_p, W_p), the walk's say in what is an object,
    nearer: np.ndarray  # and in whose it is


def compete(
    features: np.ndarray, positive: Sequence[Point], negative: Sequence[Point], config: MaskConfig
) -> Competition:
    """Patch features (H_p, W_p, D) and points as fractions (x, y) -> who owns which patch.

    The background is first learnt from the half of the frame least like the objects, for a subject may
    be cut by the frame. Where the objects then take most of the frame, that half was only the sky and
    the ground is taken for an object: once more, with all of the frame but what is most like them.
    """
    given = _given(unit(features), [sorted(positive), sorted(negative)])  # the order of clicks must not matter
    objects = [prototypes(given.features[core], config.prototypes) for core in given.cores]
    likeness = np.maximum(*(nearest(given.features, o) for o in objects))
    frame = walk.frame_of(likeness.shape)
    found = None
    for limit in (np.median(likeness[frame]), np.quantile(likeness, 0.8)):
        background = given.features[frame & (likeness <= limit)]
        if found is None or len(background) >= _LEAST_BACKGROUND:
            found = _contest(given, objects, background, config)
        if (found.subject | found.negative)[frame].mean() <= _FRAME_SHARE:
            break
    return replace(found, regions=tuple(given.regions))


def _given(features: np.ndarray, sides: Sequence[Sequence[Point]]) -> _Given:
    potentials, like_frame = walk.potentials(features, sides), walk.frame_likeness(features)
    regions = walk.regions(potentials, sides)
    seeds = [[patch_of(p, features.shape[:2]) for p in points] for points in sides]
    cores = [_core(region, s, like_frame) for region, s in zip(regions, seeds, strict=True)]
    return _Given(features, sides, regions, cores, walk.within(potentials), walk.nearer(potentials))


def _core(region: np.ndarray, seeds: Sequence[tuple[int, int]], like_frame: np.ndarray) -> np.ndarray:
    """The half of a region least like the frame, for a click on the outline brings some background with it.

    The half is taken among the patches nearest to each seed, so that each has its say. Where there is no
    region, the 3 x 3 patches around each seed are one. (H_p, W_p) bool.
    """
    rows, columns = np.mgrid[: region.shape[0], : region.shape[1]]
    away = [(rows - r) ** 2 + (columns - c) ** 2 for r, c in seeds]
    if not seeds:
        return region
    if not region.any():
        region = np.min(away, 0) <= 2
    core, nearest_seed = np.zeros_like(region), np.argmin(away, 0)
    for i in np.unique(nearest_seed[region]):
        part = region & (nearest_seed == i)
        core |= part & (like_frame <= np.median(like_frame[part]))
    return core


def _contest(given: _Given, objects: Sequence[np.ndarray], background: np.ndarray, config: MaskConfig) -> Competition:
    """Rounds of judging and learning anew, from a first set of object prototypes and background patches (n, D)."""
    features, background = given.features, prototypes(background, config.background_prototypes)
    for _ in range(config.rounds):
        found = _judge(given, objects, background, config)
        masks = tied(found, given.sides, given.cores)
        objects = [
            prototypes(features[_surest(mask, region, found.objectness, config.learn)], config.prototypes)
            if mask.any()
            else former
            for mask, region, former in zip(masks, given.regions, objects, strict=True)
        ]
        # what lies next to an object is half object: learnt as background, it would eat the object from its rim
        rest = features[(found.objectness <= 0) & ~ndimage.binary_dilation(masks[0] | masks[1])]
        if len(rest) >= _LEAST_BACKGROUND:
            background = prototypes(rest, config.background_prototypes)
    return Competition(*masks, found.objectness, found.ownership)


def _surest(mask: np.ndarray, region: np.ndarray, objectness: np.ndarray, share: float) -> np.ndarray:
    """What of a mask is no ground taken along: where the walk leads as well, and the share that is an object most clearly.

    A house or a hill behind the subject is less of an object than that, and so may its legs and tyres be, to which the
    walk leads. The mask, not an empty one, and what is returned are (H_p, W_p) bool.
    """
    return mask & (region | (objectness >= np.quantile(objectness[mask], 1 - share)))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Divide by the length along the last axis."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-8)


def prototypes(vectors: np.ndarray, count: int) -> np.ndarray:
    """Centres of k-means over unit vectors (N, D) -> at most (count, D), unit again; all of them if they are few."""
    if len(np.unique((vectors @ np.linspace(1, 2, vectors.shape[-1])).round(6))) <= count:  # cheaper than by rows
        distinct = np.unique(vectors.round(6), axis=0)
        if len(distinct) <= count:
            return unit(distinct)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an empty cluster is no fault here: it is left out
        centres, labels = kmeans2(vectors.astype(np.float64), count, iter=12, minit="++", seed=0)
    return unit(centres[np.unique(labels)])


def nearest(features: np.ndarray, prototype_set: np.ndarray) -> np.ndarray:
    """Cosine to the nearest prototype, (H_p, W_p); -1 everywhere if there is none."""
    if not len(prototype_set):
        return np.full(features.shape[:2], -1.0)
    return (features @ prototype_set.T).max(-1)


def _judge(given: _Given, objects: Sequence[np.ndarray], background: np.ndarray, config: MaskConfig) -> Competition:
    """One round: scores of every patch, before components are tied to clicks."""
    subject, negative = (nearest(given.features, o) for o in objects)
    objectness = config.likeness * np.maximum(subject, negative) - nearest(given.features, background)
    objectness = ndimage.gaussian_filter(objectness + config.nearness * given.within, config.smooth)
    # Otsu's threshold may fall between two kinds of background; below 0 the background is the nearer one anyway
    threshold = max(0.0, float(threshold_otsu(objectness))) if np.ptp(objectness) > 0 else 0.0
    if not len(objects[1]):  # no negative click: every object is the subject's
        ownership = np.ones_like(objectness)
    else:
        ownership = ndimage.gaussian_filter(subject - negative + config.nearness * given.nearer, config.smooth)
    above = objectness > threshold
    return Competition(above & (ownership > 0), above & (ownership < 0), objectness - threshold, ownership)


def tied(found: Competition, sides: Sequence[Sequence[Point]], cores: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Both masks with their own clicks inside, the other's outside, and only what a click or its region holds on to."""
    masks, anchors = [found.subject.copy(), found.negative.copy()], [core.copy() for core in cores]
    seeds = [[patch_of(p, found.subject.shape) for p in points] for points in sides]
    for mask, anchor, own, other in ((masks[0], anchors[0], *seeds), (masks[1], anchors[1], *seeds[::-1])):
        for seed in other:
            mask[seed] = False
        for seed in own:
            mask[seed] = anchor[seed] = True
    return [holding(m, a) for m, a in zip(masks, anchors, strict=True)]


def holding(mask: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Only the connected components of a mask that hold a pixel of another; both (H, W) bool."""
    labels, _ = ndimage.label(mask)
    return np.isin(labels, np.unique(labels[anchors & mask]))
