"""Views: where a pixel of the photo ends up."""

import pytest
import torch
from scipy import ndimage

from p3s_cli.methods.photos import Photo
from p3s_cli.methods.views import View, base_view, centred_view, close_view, look, look_mask, random_view


def photo():
    g = torch.Generator().manual_seed(0)
    return torch.rand(3, 32, 48, generator=g)


def test_the_plain_view_of_a_square_is_the_picture():
    square = photo()[:, :, 8:40]
    torch.testing.assert_close(look(square, View(16, 16, 32), 32), square)


def test_a_view_is_a_crop_and_a_flip_mirrors_it():
    crop = look(photo(), View(20, 16, 16), 16)
    torch.testing.assert_close(crop, photo()[:, 8:24, 12:28], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(look(photo(), View(20, 16, 16, flip=True), 16), crop.flip(2), rtol=1e-4, atol=1e-4)


def test_turning_by_ninety_degrees_is_rot90():
    square = photo()[:, :, :32]
    turned = look(square, View(16, 16, 32, degrees=90), 32)
    assert any(torch.allclose(turned, torch.rot90(square, k, (1, 2)), atol=1e-4) for k in (1, 3))


def test_the_base_view_is_the_largest_square_around_the_subject():
    mask = torch.zeros(30, 50, dtype=torch.bool)
    mask[10:20, 40:48] = True
    assert base_view(mask) == View(35, 15, 30)
    mask[15, 3] = True
    assert (
        base_view(mask) == close_view(mask) == View(25.5, 15, 45)
    )  # wider than any square inside: no more of it than that


def test_random_views_keep_the_subjects_centre_in_their_middle():
    """0.3 of the side from the middle before the turn of 8 degrees at most, so 0.3 (cos 8 + sin 8) = 0.339 after it."""
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[28:36, 20:28] = True
    g, furthest = torch.Generator().manual_seed(0), 0.0
    for _ in range(200):
        shown = look_mask(mask, random_view(base_view(mask), mask, g), 64)[0]
        at = [(shown.sum(d) * (torch.arange(64) + 0.5)).sum() / shown.sum() / 64 - 0.5 for d in (0, 1)]
        furthest = max(furthest, *(abs(a) for a in at))
    assert 0.28 < furthest < 0.339 + 1 / 64


@pytest.mark.parametrize("beyond", ["border", "zeros"])
def test_beyond_the_edge_there_is_no_second_subject(beyond):
    """A view of a whole wide photo shows more than there is, above and below; a mirror would show the subject there."""
    photo = torch.zeros(1, 30, 60)
    photo[:, 5:25, 9:49] = 1.0
    shown = look(photo, View(30, 15, 60), 60, beyond)[0] > 0.5
    assert (
        ndimage.label(shown.numpy())[1] == 1
        and ndimage.label((look(photo, View(30, 15, 60), 60)[0] > 0.5).numpy())[1] == 3
    )


def test_a_view_of_another_shape_shows_its_square_and_more_along_the_longer_side():
    wide = look(photo(), View(24, 16, 16), (16, 32))
    torch.testing.assert_close(wide, photo()[:, 8:24, 8:40], rtol=1e-4, atol=1e-4)
    tall = look(photo(), View(24, 16, 8), (32, 8))
    torch.testing.assert_close(tall, photo()[:, :, 20:28], rtol=1e-4, atol=1e-4)


def test_a_centred_view_holds_the_subject_in_its_middle_even_at_the_photos_edge():
    """And what is mirrored beyond the edge is no part of the mask."""
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[0:10, 0:20] = True
    view = centred_view(mask, 0.5)
    assert view == View(10, 5, 40)
    shown = look_mask(mask, view, 40)[0] > 0.5
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[15:25, 10:30] = True
    assert torch.equal(shown, expected)


def test_a_mirror_beyond_the_edge_never_shows_the_subject_twice():
    """The ground is mirrored where it alone would be, which looks more like ground than its last row going on."""
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[2:12, 20:40] = True
    pixels = (255 * torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))).byte()
    pixels[:, mask] = 255
    reference, view = Photo(pixels, mask), View(30, 7, 40)
    count = lambda shown: ndimage.label((shown.amin(0) > 0.99).numpy())[1]  # noqa: E731
    assert count(look(pixels.float() / 255, view, 40)) > 1 == count(reference.seen(view, 40))
    lower = View(30, 24, 40)
    torch.testing.assert_close(reference.seen(lower, 40), look(pixels.float() / 255, lower, 40))
