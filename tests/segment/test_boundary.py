"""From a coarse outline to the edge in the image."""

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from p3s_cli.config import MaskConfig
from p3s_cli.sd import images
from p3s_cli.segment.boundary import refine
from p3s_cli.segment.select import select
from p3s_cli.world.render import click, render
from p3s_cli.world.scenes import lookalike_scene


def disk(shape=(96, 128), centre=(48, 60), radius=26):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2


def picture(mask, noise=8, seed=0):
    rng = np.random.default_rng(seed)
    image = np.where(mask[..., None], (200, 60, 40), (60, 120, 180)) + rng.normal(0, noise, (*mask.shape, 3))
    return image.clip(0, 255).astype(np.uint8)


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_a_coarse_square_becomes_the_disk_that_is_there():
    truth = disk()
    coarse = np.zeros_like(truth)
    coarse[28:70, 38:84] = True
    assert overlap(coarse, truth) < 0.85
    made = refine(picture(truth), coarse, np.zeros_like(truth), coarse, [(48, 60)], patch=8, band=2)
    assert overlap(made, truth) > 0.97


def test_what_is_known_to_be_the_other_stays_out_although_it_looks_the_same():
    truth, other = disk(centre=(48, 40), radius=24), disk(centre=(48, 88), radius=24)  # they touch
    coarse, coarse_other = disk(centre=(48, 41), radius=22), disk(centre=(48, 89), radius=22)
    made = refine(picture(truth | other), coarse, coarse_other, coarse, [(48, 40)], patch=8, band=2)
    assert overlap(made, truth) > 0.85 and not (made & coarse_other).any()


def test_ground_that_the_walk_does_not_lead_to_is_given_back():
    truth = disk()
    coarse = truth.copy()
    coarse[30:90, 70:110] = True  # a piece of ground, too far from any outline to be in the band
    image, nothing = picture(truth), np.zeros_like(truth)
    alone, both = (refine(image, coarse, nothing, m, [(48, 60)], patch=8, band=1) for m in (coarse, truth))
    assert overlap(alone, truth) < 0.8 and overlap(both, truth) > 0.97


def test_islands_without_a_seed_go_and_pinholes_close():
    truth = disk()
    image = picture(truth, noise=0)
    image[46:48, 58:60] = (60, 120, 180)  # a highlight of the background's colour inside
    coarse = truth | disk(centre=(10, 10), radius=8)
    made = refine(image, coarse, np.zeros_like(truth), coarse, [(60, 60)], patch=8, band=2)
    assert not made[:24, :24].any() and made[47, 59]


def test_a_mask_over_the_whole_image_is_left_alone():
    whole = np.ones((40, 40), dtype=bool)
    assert refine(picture(whole), whole, ~whole, whole, [(20, 20)], patch=8, band=2).all()


@pytest.mark.parametrize(("seed", "category"), [(60_000_008, "dog"), (60_000_015, "teapot"), (60_000_035, "robot")])
def test_a_small_photo_keeps_the_parts_that_the_same_photo_keeps_when_large(seed, category):
    """How many pixels a patch has must not decide whether legs, handles and arms are worth their outline."""
    pixels, masks = render([lookalike_scene(seed, category)])
    photo, truth = np.asarray(images.to_pil(pixels[0])), masks[0, 0].numpy().astype(bool)
    trunk = ndimage.binary_opening(truth, iterations=4)  # no thin part is in it
    coarse = ndimage.binary_dilation(trunk, iterations=3)
    column, row = map(int, click(masks[0, 0]))
    small = refine(photo, coarse, np.zeros_like(truth), coarse, [(row, column)], patch=4, band=2.5)
    size = (4 * truth.shape[1], 4 * truth.shape[0])
    photo, coarse = cv2.resize(photo, size), cv2.resize(coarse.astype(np.float32), size) > 0.5
    seeds = [(4 * row + 2, 4 * column + 2)]
    large = refine(photo, coarse, np.zeros_like(coarse), coarse, seeds, patch=16, band=2.5).astype(np.float32)
    large = cv2.resize(large, truth.shape[::-1], interpolation=cv2.INTER_AREA) > 0.5
    assert overlap(small, large) > 0.97 and overlap(small, truth) > 0.9


def colour_patches(image):
    return torch.nn.functional.avg_pool2d(image, 8).permute(1, 2, 0) - 0.4


def test_mirroring_resizing_and_swapping_move_the_masks_along():
    left, right = disk(centre=(48, 34), radius=20), disk(centre=(48, 94), radius=20)
    pixels = picture(left)
    pixels[right] = (60, 180, 50)
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    p, n, config = [(34.5 / 128, 48.5 / 96)], [(94.5 / 128, 48.5 / 96)], MaskConfig(background_prototypes=4)
    made = select(image, colour_patches(image), p, n, config)
    assert overlap(made.subject.numpy(), left) > 0.93 and overlap(made.negative.numpy(), right) > 0.93
    swapped = select(image, colour_patches(image), n, p, config)
    assert torch.equal(made.subject, swapped.negative) and torch.equal(made.negative, swapped.subject)
    mirrored = image.flip(2)
    turned = select(mirrored, colour_patches(mirrored), [(1 - p[0][0], p[0][1])], [(1 - n[0][0], n[0][1])], config)
    assert overlap(turned.subject.flip(1).numpy(), made.subject.numpy()) > 0.97
    double = torch.nn.functional.interpolate(image[None], scale_factor=2, mode="bilinear")[0]
    large = select(double, colour_patches(image), p, n, config)
    assert overlap(large.subject[::2, ::2].numpy(), made.subject.numpy()) > 0.9  # one pixel's rim is 10 % of this disk


def test_a_large_photo_is_cut_as_its_reduction_is_in_its_own_size():
    """Four times the size at a patch of 128: worked on at 32, its outline is within two of its pixels all the same."""
    truth = disk((384, 512), (192, 240), 104)
    coarse = np.zeros_like(truth)
    coarse[112:280, 152:336] = True
    whole, rough = (np.kron(m, np.ones((4, 4), bool)) for m in (truth, coarse))
    large = refine(picture(whole), rough, np.zeros_like(whole), rough, [(768, 960)], patch=128, band=2)
    small = refine(picture(truth), coarse, np.zeros_like(truth), coarse, [(192, 240)], patch=32, band=2)
    assert overlap(large, whole) > 0.97 and overlap(large, np.kron(small, np.ones((4, 4), bool))) > 0.97


def test_where_one_colour_is_on_both_sides_no_edge_is_looked_for(monkeypatch):
    """GrabCut takes minutes to find that there is none. One side of another colour is enough for it."""
    truth, nothing = disk(), np.zeros((96, 128), dtype=bool)
    coarse, flat = disk(radius=22), np.full((96, 128, 3), 255, dtype=np.uint8)
    half = flat.copy()
    half[truth] = (200, 60, 40)
    found = refine(half, coarse, nothing, coarse, [(48, 60)], patch=16, band=1)
    assert overlap(found, truth) > 0.97
    monkeypatch.setattr(cv2, "grabCut", lambda *_: pytest.fail("looked for an edge"))
    assert np.array_equal(refine(flat, coarse, nothing, coarse, [(48, 60)], patch=16, band=1), coarse)
