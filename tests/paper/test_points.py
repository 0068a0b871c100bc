"""P3S eq. 1-2 on features made by hand, where the right mask is known."""

import numpy as np
import pytest
import torch

from p3s_cli.config import MaskConfig
from p3s_cli.paper.points import connected_mask, contrast_map, patch_of, rescaled, select, similarity_map

SUBJECT, OTHER, GROUND = torch.eye(3)


def scene(*boxes):
    """A 12 x 12 grid of ground features with (rows, columns, feature) boxes in it."""
    features = GROUND.expand(12, 12, 3).clone()
    for rows, columns, feature in boxes:
        features[rows, columns] = feature
    return features


LEFT, RIGHT = (slice(3, 9), slice(1, 5)), (slice(3, 9), slice(7, 11))
ON_LEFT, ON_RIGHT = (3 / 12, 6 / 12), (9 / 12, 6 / 12)


def test_similarity_is_the_cosine_to_the_point_and_the_maximum_over_points():
    features = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 3.0], [-1.0, 0.0]]])
    one = similarity_map(features, [(0.1, 0.1)])
    torch.testing.assert_close(one, torch.tensor([[1.0, 0.0], [0.5**0.5, -1.0]]))
    both = similarity_map(features, [(0.1, 0.1), (0.9, 0.1)])
    torch.testing.assert_close(both, torch.tensor([[1.0, 1.0], [0.5**0.5, 0.0]]))
    assert similarity_map(features, []).abs().sum() == 0


@pytest.mark.parametrize(
    ("point", "patch"), [((0, 0), (0, 0)), ((1, 1), (3, 5)), ((0.5, 0.26), (1, 3)), ((0.99, 0.24), (0, 5))]
)
def test_every_pixel_of_a_wide_photo_is_covered_by_a_patch(point, patch):
    assert patch_of(point, (4, 6)) == patch


def test_contrast_is_the_gaussian_of_mp_times_one_minus_mn():
    wanted, unwanted = torch.zeros(9, 9), torch.zeros(9, 9)
    wanted[4, 4], unwanted[4, 4] = 1.0, 0.25
    smooth = contrast_map(wanted, unwanted, 1.0)
    assert smooth.sum() == pytest.approx(0.75, rel=1e-4)  # a Gaussian moves mass, it makes none
    assert smooth[4, 4] == pytest.approx(0.75 / (2 * np.pi), rel=0.02)  # its peak at sigma = 1


def test_rescaled_spans_zero_to_one_and_survives_a_constant_map():
    assert rescaled(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert rescaled(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_only_components_with_a_seed_are_kept():
    score = np.zeros((8, 8))
    score[1:3, 1:3] = score[5:7, 5:7] = 1.0
    mask, lowered = connected_mask(score, [(1, 1)])
    assert mask.sum() == 4 and mask[2, 2] and not mask[5, 5] and not lowered
    both, _ = connected_mask(score, [(1, 1), (6, 6)])
    assert both.sum() == 8


def test_a_seed_below_otsu_lowers_the_threshold_to_just_include_it():
    score = np.linspace(0, 0.29, 64).reshape(8, 8).copy()
    score[2:6, 2:6], score[2:6, 6], score[0, 0] = 1.0, 0.3, 0.4
    mask, lowered = connected_mask(score, [(3, 6)])
    assert lowered and mask[3, 6] and mask.sum() == 20 and not mask[0, 0]  # 16 + 4 at >= 0.3


@pytest.mark.parametrize("similarity", ["raw", "rescaled"])
def test_two_look_alikes_are_told_apart_and_swapping_roles_swaps_the_masks(similarity):
    features = scene((*LEFT, SUBJECT + 0.5 * OTHER), (*RIGHT, OTHER + 0.5 * SUBJECT))
    config = MaskConfig(similarity=similarity, sigma=0.5)
    made = select(features, [ON_LEFT], [ON_RIGHT], (48, 48), config)
    swapped = select(features, [ON_RIGHT], [ON_LEFT], (48, 48), config)
    truth = torch.zeros(48, 48, dtype=torch.bool)
    truth[12:36, 4:20] = True
    assert (made.subject & truth).sum() / (made.subject | truth).sum() > 0.8
    assert not made.subject[:, 24:].any() and not made.negative[:, :24].any()
    assert torch.equal(made.subject, swapped.negative) and torch.equal(made.negative, swapped.subject)


def test_masks_never_share_a_pixel_and_hold_their_points():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        features = torch.randn(10, 14, 6, generator=g)
        p, n = torch.rand(2, 2, generator=g).tolist()
        made = select(features, [tuple(p)], [tuple(n)], (50, 70), MaskConfig())
        assert not (made.subject & made.negative).any()
        assert made.subject[patch_of(p, (50, 70))]


def test_a_seed_ends_inside_even_where_every_score_is_the_same():
    mask, lowered = connected_mask(np.full((6, 6), 0.3), [(2, 3)])
    assert mask.all() and lowered


def test_a_constant_image_has_nothing_to_part():
    """All of it is as like the point as the point itself, which is said."""
    made = select(torch.ones(6, 6, 4), [(0.5, 0.5)], [], (12, 12), MaskConfig())
    assert made.subject.all() and made.confidence == 0 and "covers nearly the whole image" in made.warnings[-1]


def test_no_negative_point_means_no_negative_mask():
    made = select(scene((*LEFT, SUBJECT)), [ON_LEFT], [], (24, 24), MaskConfig())
    assert made.negative_map.abs().sum() == 0 and not made.negative.any()


def test_mirroring_the_photo_mirrors_the_masks():
    features = scene((*LEFT, SUBJECT), (*RIGHT, OTHER))
    made = select(features, [ON_LEFT], [ON_RIGHT], (48, 48), MaskConfig())
    mirrored = select(
        features.flip(1), [(1 - ON_LEFT[0] - 1e-6, 0.5)], [(1 - ON_RIGHT[0] - 1e-6, 0.5)], (48, 48), MaskConfig()
    )
    assert (made.subject.flip(1) != mirrored.subject).float().mean() < 0.01
