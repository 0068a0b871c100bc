"""More clicks add evidence: they may not cost anything on average, in any order, on either side."""

import numpy as np
import pytest

from p3s_cli.config import MaskConfig
from p3s_cli.segment.agreement import agree
from p3s_cli.segment.prototypes import compete, unit

CONFIG = MaskConfig()


def scene(seed, noise=0.2):
    """16 x 24 patches: two objects of one kind on a ground of two, their rims half ground, noise on all of it."""
    rng = np.random.default_rng(seed)
    sky, ground, thing = unit(rng.normal(size=(3, 48)))
    plan = np.zeros((16, 24), dtype=int)
    plan[4:12, 3:9], plan[4:12, 14:21] = 1, 2
    clean = np.where(np.arange(16)[:, None, None] < 8, sky, ground) + np.zeros((16, 24, 1))
    inner = np.zeros((16, 24), dtype=bool)
    inner[5:11, 4:8] = inner[5:11, 15:20] = True
    clean[plan > 0] += thing
    clean[inner] = thing
    return unit(clean + noise * rng.normal(size=clean.shape)), plan


def at(row, column):
    return ((column + 0.5) / 24, (row + 0.5) / 16)


def overlap(mask, truth):
    return (mask & truth).sum() / (mask | truth).sum()


def test_three_clicks_are_no_worse_than_one_on_average():
    one, three = [], []
    for seed in range(6):
        features, plan = scene(seed)
        rng = np.random.default_rng(seed)
        clicks = [at(*p) for p in rng.permutation(np.argwhere(plan == 1))[:3]]
        one += [overlap(agree(features, [c], [at(8, 17)], CONFIG).subject, plan == 1) for c in clicks]
        three.append(overlap(agree(features, clicks, [at(8, 17)], CONFIG).subject, plan == 1))
    assert np.mean(three) >= np.mean(one) > 0.6


@pytest.mark.parametrize("seed", range(3))
def test_order_does_not_matter_and_swapped_sides_swap(seed):
    features, _ = scene(seed)
    p, n = [at(5, 5), at(9, 7), at(8, 4)], [at(6, 17), at(10, 16)]
    made, swapped, reordered = (agree(features, *c, CONFIG) for c in ((p, n), (n, p), (p[::-1], n[::-1])))
    assert np.array_equal(made.subject, swapped.negative) and np.array_equal(made.negative, swapped.subject)
    assert np.array_equal(made.subject, reordered.subject) and np.array_equal(made.negative, reordered.negative)
    assert all(made.subject[int(y * 16), int(x * 24)] for x, y in p)
    assert all(made.negative[int(y * 16), int(x * 24)] for x, y in n)


def test_one_click_a_side_is_the_competition_itself():
    features, _ = scene(0)
    made, plain = (f(features, [at(6, 5)], [at(8, 17)], CONFIG) for f in (agree, compete))
    assert np.array_equal(made.subject, plain.subject) and np.array_equal(made.objectness, plain.objectness)


def test_clicks_on_two_things_do_not_agree_and_both_are_taken():
    features, plan = scene(0, noise=0.05)
    made = agree(features, [at(7, 5), at(7, 17)], [], CONFIG)
    assert made.subject[plan > 0].mean() > 0.8
