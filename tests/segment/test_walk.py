"""The random walk on hand-made patches: a region is a matter of the object, not of where in it one clicks."""

from dataclasses import replace

import numpy as np
import pytest

from p3s_cli.config import MaskConfig
from p3s_cli.segment import prototypes, walk
from p3s_cli.segment.prototypes import compete, unit


def scene(seed=0):
    """16 x 24 patches: two objects of the same kind on a ground of two kinds; their outlines are mixtures."""
    rng = np.random.default_rng(seed)
    sky, ground, thing = unit(rng.normal(size=(3, 48)))
    plan = np.zeros((16, 24), dtype=int)
    plan[4:12, 3:9], plan[4:12, 14:21] = 1, 2
    clean = np.where(np.arange(16)[:, None, None] < 8, sky, ground) + np.zeros((16, 24, 1))
    clean[plan > 0] = thing
    for side in (1, 2):
        rim = (plan == side) & ~np.pad(plan == side, 1)[2:, 1:-1]  # the feet: half object, half ground
        clean[rim] = thing + ground
    return unit(clean + 0.04 * rng.normal(size=clean.shape)), plan


def regions(features, sides):
    return walk.regions(walk.potentials(features, sides), sides)


def at(row, column):
    return ((column + 0.5) / 24, (row + 0.5) / 16)


def overlap(mask, truth):
    return (mask & truth).sum() / (mask | truth).sum()


@pytest.mark.parametrize("click", [(7, 5), (4, 3), (11, 5), (8, 8), (11, 8)])
def test_the_mask_does_not_depend_on_where_in_the_object_the_click_is(click):
    features, plan = scene()
    won = compete(features, [at(*click)], [at(7, 17)], MaskConfig())
    assert overlap(won.subject, plan == 1) > 0.85 and not won.subject[plan == 2].any()


def test_no_connection_no_region_and_swapped_sides_swap():
    features, plan = scene(1)
    first, second = regions(features, [[at(7, 5)], [at(7, 17)]])
    swapped = regions(features, [[at(7, 17)], [at(7, 5)]])
    assert first[plan == 1].mean() > 0.7 and second[plan == 2].mean() > 0.7
    assert not first[plan == 2].any() and not second[plan == 1].any()  # alike, but not joined
    assert np.array_equal(first, swapped[1]) and np.array_equal(second, swapped[0])


def test_a_side_without_points_has_no_region_and_flat_features_do_not_fail():
    features, _ = scene()
    assert not regions(features, [[at(7, 5)], []])[1].any()
    assert len(regions(np.ones((6, 8, 4)) / 2, [[(0.5, 0.5)], []])) == 2


def test_what_takes_little_of_the_frame_is_not_like_the_frame():
    features = np.zeros((10, 10, 2))
    features[..., 0] = 1
    features[3:7, 0:4] = (0, 1)  # cut by the frame, on 4 of its 36 patches
    like = walk.frame_likeness(features)
    assert np.allclose(like[0], 1) and np.allclose(
        like[3:7, 0:4], 4 / 10
    )  # 30 % of 36 is 10, and 4 of them are its own


def test_between_twins_the_walk_decides_and_not_the_straight_line():
    features, plan = scene()
    p, n = [at(5, 3), at(8, 8), at(9, 8)], [at(7, 19)]  # the clicks on the left are closer to the right one's near side
    near = walk.nearer(walk.potentials(features, [p, n]))
    assert (near[plan == 1] > 0).all() and (near[plan == 2] < 0).all() and np.abs(near).max() <= 1
    assert np.allclose(near, -walk.nearer(walk.potentials(features, [n, p])))


def test_within_is_relative_and_above_zero_just_in_the_regions():
    features, plan = scene()
    sides = [[at(7, 5)], [at(7, 17)]]
    potentials = walk.potentials(features, sides)
    inside = walk.within(potentials)
    assert (0 <= inside).all() and (inside < 1).all()
    assert np.allclose(inside, walk.within(7 * potentials), atol=1e-6)  # (u - t) / (u + t) has no unit
    assert np.array_equal(inside, walk.within(potentials[::-1]))  # either side's clicks count the same
    first, second = walk.regions(potentials, sides)
    assert not inside[plan == 0].any() and (inside[first | second] > 0).all()


def test_where_likeness_says_nothing_the_walk_says_what_is_an_object():
    # every patch the same, so that it is as near to the object's prototype as to the background's
    features, inside = np.ones((8, 8, 2)) / np.sqrt(2), np.zeros((8, 8))
    inside[2:5, 2:6] = 0.5
    alike, no_blur = [features[0, :1], features[0, :0]], replace(MaskConfig(), smooth=1e-3)
    given = prototypes._Given(features, [], [], [], inside, np.ones((8, 8)))
    won = prototypes._judge(given, alike, features[0, :1], no_blur)
    assert np.array_equal(won.subject, inside > 0)
