"""Every choice of the default masks next to what it was chosen over: one setting, one row of `masks.py --ablate`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import cv2
import numpy as np
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.segmentation import random_walker, slic

from p3s_cli.config import MaskConfig
from p3s_cli.sd.vision import VisionTower
from p3s_cli.segment import boundary, prototypes, walk
from p3s_cli.segment import select as segment
from p3s_cli.segment.boundary import refine
from p3s_cli.segment.prototypes import holding

_SUPERPIXEL = 12  # pixels across


@dataclass(frozen=True)
class Choice:
    """What differs from the default: of `MaskConfig`, of the tower (`layers`, `side` relative to its own), of the
    code (`swaps`: module, name, replacement), or of the clicks."""

    name: str
    config: dict = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    side: float = 1.0
    swaps: tuple[tuple[object, str, object], ...] = ()
    with_negative: bool = True


def walker_edges(image, coarse, other, agreed, seeds, patch, band) -> np.ndarray:
    """Instead of GrabCut: scikit-image's random walker on Lab colours in the same band."""
    inside, outside = ndimage.distance_transform_edt(coarse), ndimage.distance_transform_edt(~coarse)
    reach = min(band * patch, 0.6 * inside.max())
    labels = np.zeros(coarse.shape, np.int32)
    labels[inside > reach], labels[(outside > band * patch) | other] = 1, 2
    for seed in seeds:
        labels[seed] = 1
    rim = (inside > reach + 3) | (outside > band * patch + 3)
    labels[rim & (labels != 0)] = -1
    lab = rgb2lab(image) / 40
    walked = random_walker(lab, labels, beta=1000, mode="cg_j", tol=1e-2, channel_axis=-1) == 1
    return holding(walked | (inside > reach), inside > reach)


def superpixel_edges(image, coarse, other, agreed, seeds, patch, band) -> np.ndarray:
    """Instead of GrabCut: a superpixel (SLIC) belongs to the mask if most of it does."""
    found = slic(image, n_segments=coarse.size // _SUPERPIXEL**2, compactness=10, start_label=0)
    share = ndimage.mean(coarse, found, np.arange(found.max() + 1))
    return holding((share > 0.5)[found] & ~other, coarse)


def grabcut_from_clicks(image, coarse, other, agreed, seeds, patch, band) -> np.ndarray:
    """GrabCut without any features: the clicks' patches are sure, all else is open."""
    dots = np.zeros_like(coarse)
    for seed in seeds:
        dots[seed] = True
    near = ndimage.distance_transform_edt(~dots)
    labels = np.where(near < 2 * patch, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[near < patch] = cv2.GC_FGD
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(np.ascontiguousarray(image[..., ::-1]), labels, None, *models, 3, cv2.GC_INIT_WITH_MASK)
    return holding((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD), dots)


def sure_inside(image, coarse, other, agreed, *rest) -> np.ndarray:
    """GrabCut with all that lies deep in the coarse mask sure, whatever the walk says."""
    return refine(image, coarse, other, coarse, *rest)


def no_regions(potentials: np.ndarray, sides: Sequence) -> list[np.ndarray]:
    """Instead of the walk: nothing, so that the 3 x 3 patches at each click start the prototypes."""
    return [np.zeros(potentials.shape[1:], bool) for _ in sides]


def whole_region(region: np.ndarray, seeds: Sequence[tuple[int, int]], like_frame: np.ndarray) -> np.ndarray:
    """Instead of a region's half least like the frame: all of it."""
    return region if region.any() else _core(region, seeds, like_frame)


def walk_alone(features, positive, negative, config: MaskConfig) -> prototypes.Competition:
    """Instead of competing prototypes: the walk's regions as they are."""
    sides = [positive, negative]
    subject, other = walk.regions(walk.potentials(prototypes.unit(features), sides), sides)
    score = subject.astype(float) - other
    return prototypes.Competition(subject, other, np.abs(score), score, (subject, other))


def whose_alone(given, objects, background, config) -> prototypes.Competition:
    """The walk decides between the two objects, and between object and background only likeness does."""
    return _judge(replace(given, within=np.zeros_like(given.within)), objects, background, config)


_core, _judge = prototypes._core, prototypes._judge
_EDGES, _START = (segment, "refine"), (prototypes.walk, "regions")

CHOICES = [
    Choice("eq. 1-2 as printed, raw cosines", {"recipe": "paper"}),
    Choice("eq. 1-2 as printed, maps rescaled", {"recipe": "paper", "similarity": "rescaled"}),
    Choice("**the default**"),
    Choice("edges: none, patches as they are", {"band": 0.0}),
    Choice("edges: superpixels", swaps=((*_EDGES, superpixel_edges),)),
    Choice("edges: random walker, band 1", {"band": 1.0}, swaps=((*_EDGES, walker_edges),)),
    Choice("edges: random walker, band 2.5", swaps=((*_EDGES, walker_edges),)),
    Choice("edges: GrabCut from the clicks, no features", swaps=((*_EDGES, grabcut_from_clicks),)),
    Choice("edges: GrabCut, band 1", {"band": 1.0}),
    Choice("edges: GrabCut, band 1.5", {"band": 1.5}),
    Choice("edges: GrabCut, band 3.5", {"band": 3.5}),
    Choice("edges: GrabCut at the photo's own size", swaps=((boundary, "_PATCH", (0.0, math.inf)),)),
    Choice("edges: GrabCut, sure without the walk", swaps=((*_EDGES, sure_inside),)),
    Choice("start: the 3 x 3 patches at a click", swaps=((*_START, no_regions),)),
    Choice("start: all of the walk's region", swaps=((prototypes, "_core", whole_region),)),
    Choice("the walk's region alone, no prototypes", swaps=((segment, "agree", walk_alone),)),
    Choice("prototypes learn from all of a mask", {"learn": 1.0}),
    Choice("prototypes learn from half of it", {"learn": 0.5}),
    Choice("rounds: one", {"rounds": 1}),
    Choice("rounds: five", {"rounds": 5}),
    Choice("prototypes a side: one", {"prototypes": 1}),
    Choice("prototypes a side: eight", {"prototypes": 8}),
    Choice("prototypes of the background: five", {"background_prototypes": 5}),
    Choice("prototypes of the background: twenty", {"background_prototypes": 20}),
    Choice("competition: negative clicks ignored", with_negative=False),
    Choice("competition: no nearness along the walk", {"nearness": 0.0}),
    Choice("competition: nearness says whose, not what is an object", swaps=((prototypes, "_judge", whose_alone),)),
    Choice("competition: twice the nearness", {"nearness": 0.5}),
    Choice("competition: likeness to the object counts half", {"likeness": 0.5}),
    Choice("scores not smoothed", {"smooth": 0.01}),
    Choice("layer: last", layers=(-1,)),
    Choice("layer: 8 of 12 alone", layers=(8,)),
    Choice("layers: 4-6", layers=(4, 5, 6)),
    Choice("layers: 10-12", layers=(10, 11, 12)),
    Choice("resolution: half", side=0.5),
    Choice("resolution: 1.33 times", side=4 / 3),
]


@contextmanager
def made_with(choice: Choice, tower: VisionTower) -> Iterator[MaskConfig]:
    """The configuration of a choice, with the tower and the code as it wants them until the block ends."""
    side = tower.patch * round(tower.side * choice.side / tower.patch)
    with ExitStack() as stack:
        for module, name, replacement in choice.swaps:
            stack.enter_context(mock.patch.object(module, name, replacement))
        stack.enter_context(mock.patch.multiple(tower, layers=choice.layers or tower.layers, side=side))
        yield replace(MaskConfig(), **choice.config)
