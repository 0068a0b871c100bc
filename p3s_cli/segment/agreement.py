"""Several clicks on one thing: whose a patch is they decide together, what is an object each of them alone.

Whose a patch is, is known the better the more clicks there are. What is an object at all is not: started
from all clicks at once, the prototypes take along whatever background any one of them brought. That is
noise, and the mean of what each click finds alone takes it away. A click that alone does not find the
others' places marks another part than they do, and is not heard alone; without any that is heard, all
together decide that as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import ndimage

from p3s_cli.config import MaskConfig
from p3s_cli.paper.points import Point, patch_of
from p3s_cli.segment.prototypes import Competition, compete, tied


def agree(
    features: np.ndarray, positive: Sequence[Point], negative: Sequence[Point], config: MaskConfig
) -> Competition:
    """`compete`, for any number of clicks; features (H_p, W_p, D), points as fractions (x, y).

    With one click a side it is the same. Of a side with more, each click is asked alone with all of the
    other side's, and heard where every click of its side is on one connected part of the objects it finds.
    """
    together = compete(features, positive, negative, config)
    alone = list(_alone(features, positive, negative, config))
    if not alone:
        return together
    objectness = np.mean(alone, 0)
    above, ownership = objectness > 0, together.ownership
    mean = Competition(above & (ownership > 0), above & (ownership < 0), objectness, ownership)
    masks = tied(mean, (positive, negative), (together.subject & above, together.negative & above))
    return Competition(*masks, objectness, ownership, together.regions)


def _alone(features, positive, negative, config: MaskConfig) -> Iterator[np.ndarray]:
    """Objectness (H_p, W_p) found by single clicks of a side that has several, where one thing holds them all.

    Sorted, for the order of clicks must not matter.
    """
    for side, points in enumerate((sorted(positive), sorted(negative))):
        for point in points if len(points) > 1 else ():
            clicks = ([point], negative) if side == 0 else (positive, [point])
            objectness = compete(features, *clicks, config).objectness
            things, _ = ndimage.label(objectness > 0)
            reached = {int(things[patch_of(p, things.shape)]) for p in points}
            if len(reached) == 1 and 0 not in reached:
                yield objectness
